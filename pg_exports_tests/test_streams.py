"""Exports that read and copy an interval over several connections: the same rows, each once, whatever fails on the way."""

import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._daemon.monitoring.concurrency import execute_concurrency_slots_iteration

from pg_exports import PostgresExport, PostgresIOManager
from pg_exports.interval import Interval
from pg_exports.models.model import Part
from pg_exports.postgres import locks
from pg_exports.postgres import session as sessions
from pg_exports.postgres import streams as streams_module
from pg_exports.postgres.table import Destination
from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, NOTHING, ROWS, eventually, fill, fill_persons, landed, make_tables
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, new_session, session
from pg_exports_tests.test_concurrency import each_once, holding, waiting
from pg_exports_tests.test_late_rows import asked
from pg_exports_tests.test_ranges import hour_lock

STREAMS = 3

OWN = {
    "name": "own",
    "query": "SELECT toString(uuid) AS id, event AS what FROM events"
    " WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"id": "TEXT", "what": "TEXT"},
    "key": ["id"],
}


def fill_sessions(source: Source, hour: datetime) -> None:
    insert_sessions(source, *(session(new_session(hour), hour, distinct_id=str(number)) for number in range(60)))


FILL: dict[str, Callable[[Source, datetime], None]] = {
    "events": fill,
    "persons": fill_persons,
    "sessions": fill_sessions,
}


def answered(source: Source, export: str) -> list[int]:
    """The rows that each query of an export has given."""
    source.execute("SYSTEM FLUSH LOGS")
    rows = source.rows(
        "SELECT result_rows FROM system.query_log WHERE type = 'QueryFinish' AND has(databases, {database:String})"
        " AND JSONExtractString(log_comment, 'export') = {export:String}",
        {"database": source.database, "export": export},
    )
    return [int(number) for (number,) in rows]


def ledger_row(target: Target) -> tuple[Any, ...]:
    """What the ledger has of the one interval with rows: at the source, inserted, unchanged, missing, and keys."""
    [row] = target.rows(
        "SELECT rows_at_source, rows_inserted, rows_unchanged, rows_missing, keys FROM pg_exports_ledger"
        " WHERE rows_at_source > 0"
    )
    return row


# The same rows


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_the_parts_are_all_there_is_and_do_not_overlap(count: int) -> None:
    bounds = [Part(number, count).parameters for number in range(count)]
    if count == 1:
        assert bounds == [{}]
        return
    assert bounds[0]["part_first"] == 0
    assert bounds[-1]["part_last"] == 2**64 - 1
    assert all(one["part_last"] == int(str(other["part_first"])) - 1 for one, other in pairwise(bounds))


@pytest.mark.parametrize("model", ["events", "persons", "sessions", "own"])
def test_several_connections_bring_what_one_brings(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    FILL.get(model, fill)(source, hour)
    settings: dict[str, Any] = {"model": OWN if model == "own" else model, "team_id": TEAM, "start": hour - 36 * HOUR}
    settings["schema"] = target.schema
    key = partition_key(hour)
    one = run(PostgresExport(**settings, name="one", table="one"), key)
    several = run(PostgresExport(**settings, name="several", table="several", streams=STREAMS), key)
    assert one.error is None
    assert several.error is None
    assert several.counts == one.counts != (0, 0, 0)
    assert target.rows("TABLE one EXCEPT ALL TABLE several") == target.rows("TABLE several EXCEPT ALL TABLE one") == []
    kept = "rows_at_source, rows_inserted, rows_updated, rows_unchanged, rows_missing, keys, fingerprint"
    [(number,)] = target.rows(f"SELECT count(DISTINCT ({kept})) FROM pg_exports_ledger WHERE rows_at_source > 0")
    assert number == 1


def test_each_connection_asks_for_its_own_part_and_takes_about_as_many_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    done = run(export_of("events", target, hour, streams=STREAMS), partition_key(hour))
    assert done.error is None
    shares = answered(source, "events")
    assert (len(shares), sum(shares)) == (STREAMS, ROWS)
    assert min(shares) > ROWS / STREAMS / 2
    # Each connection is a transaction of its own.
    shares = [int(rows) for (rows,) in target.rows("SELECT count(*) FROM events GROUP BY xmin::text")]
    assert len(shares) >= STREAMS
    assert sum(shares) == ROWS


@pytest.mark.parametrize("model", ["events", "persons"])
def test_a_run_again_adds_late_rows_alone(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    FILL[model](source, hour)
    export = export_of(model, target, hour, streams=STREAMS)
    assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, ROWS)
    if model == "events":
        source.insert("events", *(event(hour, distinct_id=name) for name in ("late", "later", "latest")))
        late = run(export, partition_key(hour))
        assert late.counts == (3, 0, ROWS)
        assert late.reconciliation.passed
        assert each_once(target) == ROWS + 3


def test_rows_that_were_in_the_table_before_are_recognised_by_each_connection(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    make_tables(run, target, hour)
    target.execute("TRUNCATE pg_exports_ledger", "DELETE FROM pg_exports_keys")
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    target.execute("TRUNCATE pg_exports_ledger, pg_exports_keys", "DELETE FROM events WHERE hashtext(uuid) % 2 = 0")
    left = target.count("events")
    again = run(export_of("events", target, hour, streams=STREAMS), partition_key(hour))
    assert again.error is None
    assert again.counts == (ROWS - left, 0, left)
    assert each_once(target) == ROWS


def test_bad_rows_of_each_part_are_set_aside_once_and_resolved_when_they_are_good(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    make_tables(run, target, hour)
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE varchar(5)")
    rows = [event(hour, distinct_id=str(number), event="short") for number in range(20)]
    bad = [event(hour, distinct_id=str(number), event="too long") for number in range(20)]
    source.insert("events", *rows, *bad)
    export = export_of("events", target, hour, streams=STREAMS)
    for _ in range(2):
        assert run(export, partition_key(hour)).error is None
        assert (target.count("events"), target.count("pg_exports_rejected")) == (20, 20)
    assert target.rows("SELECT count(*) FROM pg_exports_rejected WHERE resolved_at IS NULL") == [(20,)]
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE text")
    assert run(export, partition_key(hour)).counts == (20, 0, 20)
    assert target.rows("SELECT count(*) FROM pg_exports_rejected WHERE resolved_at IS NULL") == [(0,)]


# What fails


def refuse_ledger(target: Target, condition: str, state: str = "raise_exception") -> None:
    """Have Postgres refuse rows of the ledger that fulfil a condition."""
    target.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF {condition} THEN RAISE 'not this one' USING ERRCODE = '{state}'; END IF;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


@pytest.mark.parametrize("number", [0, STREAMS - 1])
def test_one_bad_row_in_any_part_leaves_nothing_of_the_interval_where_bad_rows_fail(
    source: Source, target: Target, run: RunExport, hour: datetime, number: int
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    bounds = Part(number, STREAMS).parameters
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
        " SELECT generateUUIDv4(), '$pageview', '{\"a\": \"\\\\u0000\"}', {hour:DateTime64(6)}, 1, toString(number),"
        " {hour:DateTime64(6)}, {hour:DateTime64(6)} FROM numbers(100000)"
        " WHERE cityHash64(toString(number)) BETWEEN {part_first:UInt64} AND {part_last:UInt64} LIMIT 1",
        {"hour": hour.strftime("%Y-%m-%d %H:%M:%S"), **bounds},
    )
    export = export_of("events", target, hour, streams=STREAMS, on_bad_rows="fail")
    failed = run(export, partition_key(hour))
    assert failed.tries == 1
    assert "NUL or half a surrogate pair" in (failed.error or "")
    assert landed(target) == NOTHING
    repaired = run(export_of("events", target, hour, streams=STREAMS), partition_key(hour))
    assert repaired.counts == (ROWS + 1, 0, 0)


def test_what_fails_between_two_commits_is_in_the_ledger_and_the_next_run_sends_the_rest(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    refuse_ledger(target, "new.rows_at_source > 0 AND new.rows_missing = 0")
    export = export_of("events", target, hour, streams=STREAMS)
    failed = run(export, partition_key(hour))
    assert "refuse() line 3 at RAISE" in (failed.error or "")
    there = each_once(target)
    assert 0 < there < ROWS
    assert ledger_row(target) == (ROWS, there, 0, ROWS - there, there)
    # The sensor that finds late events takes it for one that has some.
    assert asked(export, source, target) == [partition_key(hour)]
    target.execute("DROP TRIGGER refuse ON pg_exports_ledger")
    assert run(export, partition_key(hour)).counts == (ROWS - there, 0, there)
    assert each_once(target) == ROWS
    assert ledger_row(target) == (ROWS, ROWS - there, there, 0, ROWS)
    assert run(export, partition_key(hour)).counts == (0, 0, ROWS)


def test_the_rest_may_come_over_one_connection_and_of_a_daily_export(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    hour -= 24 * HOUR  # of a day that is over
    make_tables(run, target, hour)
    fill(source, hour)
    refuse_ledger(target, "new.rows_at_source > 0 AND new.rows_missing = 0")
    assert run(export_of("events", target, hour, streams=STREAMS), partition_key(hour)).error
    there = each_once(target)
    target.execute("DROP TRIGGER refuse ON pg_exports_ledger")
    day = hour.replace(hour=0)
    daily = export_of("events", target, hour, name="daily", interval="day", start=f"{day:%Y-%m-%d}", timezone="UTC")
    assert run(daily, f"{day:%Y-%m-%d}").counts == (ROWS - there, 0, there)
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    assert each_once(target) == ROWS


@pytest.mark.parametrize("model", ["events", "persons"])
def test_a_passing_error_between_two_commits_is_mended_by_the_run_itself(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    FILL[model](source, hour)
    export = export_of(model, target, hour, streams=STREAMS)
    assert run(export, partition_key(hour - 10 * HOUR)).error is None
    target.execute("CREATE SEQUENCE tries")
    target.execute("GRANT ALL ON SEQUENCE tries TO PUBLIC")
    refuse_ledger(
        target,
        f"new.rows_at_source > 0 AND new.rows_missing = 0 AND nextval('\"{target.schema}\".tries') < 3",
        "serialization_failure",
    )
    done = run(export, partition_key(hour))
    assert (done.error, done.tries, done.counts) == (None, 3, (ROWS, 0, 0))
    assert target.count(model) == ROWS
    assert ledger_row(target)[3] == 0


@contextlib.contextmanager
def stalled(target: Target) -> Iterator[None]:
    """Each connection waits where it would write the first journal."""
    target.execute(
        "CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_advisory_xact_lock_shared(hashtext('{target.schema}')); RETURN new; END $$",
        "CREATE TRIGGER stall BEFORE INSERT ON pg_exports_keys FOR EACH STATEMENT EXECUTE FUNCTION stall()",
    )
    with holding(target, f"SELECT pg_advisory_xact_lock(hashtext('{target.schema}'))"):
        yield


@pytest.mark.parametrize("which", [0, 1])
def test_a_connection_that_breaks_while_rows_are_copied_leaves_nothing_and_the_next_try_brings_all(
    source: Source, target: Target, run: RunExport, hour: datetime, which: int
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    export = export_of("events", target, hour, streams=STREAMS)
    with ThreadPoolExecutor(1) as threads:
        with stalled(target):
            done = threads.submit(run, export, partition_key(hour))
            eventually(lambda: waiting(target) == STREAMS)
            assert landed(target) == NOTHING
            ordered = "ASC" if which == 0 else "DESC"
            target.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pg_exports'"
                f" AND wait_event_type = 'Lock' ORDER BY backend_start {ordered} LIMIT 1"
            )
            eventually(lambda: waiting(target) < STREAMS)
        ended = done.result()
    assert (ended.error, ended.tries) == (None, 2)
    assert landed(target) == EACH_ROW_ONCE


def test_an_interrupt_ends_all_connections_and_leaves_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)

    def interrupt() -> None:
        eventually(lambda: waiting(target) == STREAMS)
        os.kill(os.getpid(), signal.SIGINT)

    with stalled(target):
        thread = threading.Thread(target=interrupt)
        thread.start()
        began = time.monotonic()
        run(export_of("events", target, hour, streams=STREAMS), partition_key(hour))
        thread.join()
        assert time.monotonic() - began < 30
        eventually(lambda: waiting(target) == 0)
    assert landed(target) == NOTHING
    eventually(lambda: not target.rows("SELECT FROM pg_stat_activity WHERE application_name = 'pg_exports'"))


def test_a_connection_that_waits_long_for_the_others_is_not_given_up_by_the_server(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    monkeypatch.setattr(sessions, "IDLE_TIMEOUT", 2)
    monkeypatch.setattr(streams_module, "KEEP_ALIVE", 0.5)
    # Of one part alone, whose rows then take long.
    target.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NOT pg_try_advisory_xact_lock(hashtext(current_schema())) THEN RETURN new; END IF;"
        " PERFORM pg_sleep(5); RETURN new; END $$",
        "CREATE TRIGGER slow BEFORE INSERT ON pg_exports_keys FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    done = run(export_of("events", target, hour, streams=STREAMS), partition_key(hour))
    assert (done.error, done.tries) == (None, 1)
    assert landed(target) == EACH_ROW_ONCE


# Beside others


def test_a_run_of_the_interval_waits_for_parts_whose_first_connection_has_gone(target: Target, hour: datetime) -> None:
    interval, destination = Interval("", hour, hour + HOUR), Destination(None, target.schema, "events")
    postgres = target.resource()
    with (
        postgres.session() as first,
        postgres.session() as further,
        postgres.session() as later,
        ThreadPoolExecutor(1) as threads,
        further.transaction(),
    ):
        with first.transaction():
            locks.lock(first, destination, [interval])
            locks.join(further, destination, interval)
        # Its locks are free, as if it had died.
        began = threads.submit(_lock, later, destination, interval)
        eventually(lambda: waiting(target) == 1)
        further.execute("COMMIT", doing="committing")
        assert began.result() == [interval]


def _lock(session: Any, destination: Destination, *intervals: Interval) -> list[Interval]:
    with session.transaction():
        return list(locks.lock(session, destination, intervals))


def test_intervals_of_which_parts_are_to_come_are_not_written_together_with_others(
    target: Target, hour: datetime
) -> None:
    hours = [Interval("", hour + n * HOUR, hour + (n + 1) * HOUR) for n in range(4)]
    destination, postgres = Destination(None, target.schema, "events"), target.resource()
    with postgres.session() as further, postgres.session() as later, further.transaction():
        locks.join(further, destination, hours[2])
        assert _lock(later, destination, *hours) == hours[:2]
        assert _lock(later, Destination(None, target.schema, "other"), *hours) == hours


def test_two_runs_of_an_interval_over_several_connections_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    export = export_of("events", target, hour, streams=STREAMS)
    with ThreadPoolExecutor(2) as threads:
        with holding(target, hour_lock(target, hour)):
            runs = [threads.submit(run, export, partition_key(hour)) for _ in range(2)]
            eventually(lambda: waiting(target) == 2)
        done = [one.result() for one in runs]
    assert [one.error for one in done] == [None, None]
    assert sorted(one.counts for one in done) == [(0, 0, ROWS), (ROWS, 0, 0)]
    assert landed(target) == EACH_ROW_ONCE


def test_a_truncate_that_waits_for_the_first_connection_does_not_hold_up_the_others(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    make_tables(run, target, hour)
    fill(source, hour)
    with ThreadPoolExecutor(2) as threads:
        with holding(target, "LOCK TABLE pg_exports_keys IN ACCESS EXCLUSIVE MODE"):
            done = threads.submit(run, export_of("events", target, hour, streams=STREAMS), partition_key(hour))
            eventually(lambda: waiting(target) == 1)
            emptied = threads.submit(target.execute, "TRUNCATE events")
            eventually(
                lambda: bool(target.rows("SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted"))
            )
        ended = done.result()
        emptied.result()
    assert ended.error is None
    assert ended.counts == (ROWS, 0, 0)
    assert sum("over one connection less" in line for line in ended.log) == STREAMS - 1


# Slots of the pool


@pytest.fixture
def instance(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance as a deployment has it, whose pools have two slots."""
    settings = (repository / "dagster.yaml").read_text()
    for setting, changed in (("default_limit: 4", "default_limit: 2"), ("run_end_seconds: 60", "run_end_seconds: 1")):
        assert setting in settings
        settings = settings.replace(setting, changed)
    (tmp_path / "dagster.yaml").write_text(settings)
    for name, value in sandbox.environment().items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def test_an_export_has_no_more_connections_than_its_pool_has_slots(
    source: Source, target: Target, hour: datetime, instance: dg.DagsterInstance
) -> None:
    fill(source, hour)
    pool = f"pool_{uuid.uuid4().hex[:8]}"
    export = export_of("events", target, hour, streams=4, connection=pool)
    resources = {
        "clickhouse": source.resource(),
        f"{pool}_io_manager": PostgresIOManager(postgres=target.resource()),
    }
    job = dg.Definitions.merge(
        export.build_defs(None), dg.Definitions(resources=resources, executor=dg.in_process_executor)
    ).resolve_implicit_global_asset_job_def()
    done = job.execute_in_process(instance=instance, partition_key=partition_key(hour), raise_on_error=False)
    assert done.success
    log = [entry.user_message for entry in instance.all_logs(done.run_id)]
    assert "events has 2 of 4 streams: its pool has no more slots." in log
    assert len(answered(source, "events")) == 2
    assert landed(target) == EACH_ROW_ONCE
    [slots] = [instance.event_log_storage.get_concurrency_info(pool)]
    assert (slots.active_slot_count, slots.pending_step_count) == (0, 0)


def test_the_slots_of_a_run_that_died_are_free_again_after_a_while(instance: dg.DagsterInstance) -> None:
    pool, storage = f"pool_{uuid.uuid4().hex[:8]}", instance.event_log_storage
    run = instance.create_run_for_job(dg.JobDefinition(graph_def=dg.GraphDefinition(name="died")))
    storage.initialize_concurrency_limit_to_default(pool)
    assert storage.claim_concurrency_slot(pool, run.run_id, "events").is_claimed
    instance.report_run_failed(run)
    context = SimpleNamespace(instance=instance)

    def are_free() -> bool:
        list(execute_concurrency_slots_iteration(context, logging.getLogger()))  # type: ignore[arg-type]  # it asks for no more
        return storage.get_concurrency_info(pool).active_slot_count == 0

    assert storage.get_concurrency_info(pool).active_slot_count == 1
    eventually(are_free)


# Settings


@pytest.mark.parametrize("streams", [0, -1, 17])
def test_streams_are_one_to_sixteen(streams: int) -> None:
    with pytest.raises(Exception, match="`streams` must be 1 to 16"):
        PostgresExport(model="events", team_id=1, start="2026-11-20", streams=streams)


def test_streams_are_not_for_exports_that_look_for_repeated_events_in_the_whole_table() -> None:
    with pytest.raises(Exception, match="`streams` are for `deduplicate: interval`"):
        PostgresExport(model="events", team_id=1, start="2026-11-20", streams=2, deduplicate="table")
