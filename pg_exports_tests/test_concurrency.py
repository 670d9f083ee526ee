"""Runs at the same moment, and several exports of one table: each row once, none missing, and nobody has to try again.

Runs that are to meet are held at a lock that all of them need, until the last one waits for it.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from pg_exports import PostgresExport
from pg_exports.postgres.schemas import CREATION_LOCK
from pg_exports.sandbox import postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, mapping, new_session, person, session

Job = tuple[PostgresExport, str] | tuple[PostgresExport, str, str]
"""An export, and the partition or the first and last one of the range that it is run for."""

THE_TABLE = "LOCK TABLE {schema}.{table} IN ACCESS EXCLUSIVE MODE"
CREATING = f"SELECT pg_advisory_xact_lock(hashtext('{CREATION_LOCK}'))"


@pytest.fixture
def day(hour: datetime) -> datetime:
    """Start of yesterday."""
    return hour.replace(hour=0) - timedelta(days=1)


@contextlib.contextmanager
def holding(target: Target, statement: str) -> Iterator[Callable[[str], None]]:
    """Another session that holds a lock until the block ends; what it gives executes more statements there."""
    with postgres_server.admin(target.sandbox.postgres, DATABASE) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(f'SET LOCAL search_path = "{target.schema}"')
        cursor.execute(statement)
        try:
            yield cursor.execute
        finally:
            cursor.execute("COMMIT")


def waiting(target: Target) -> int:
    """How many runs wait for a lock."""
    [(runs,)] = target.rows(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_exports' AND wait_event_type = 'Lock'"
    )
    return int(runs)


def at_once(target: Target, run: RunExport, *jobs: Job, lock: str = THE_TABLE, table: str = "events") -> list[Run]:
    """Run the jobs, none of which goes on before all of them wait for the lock. Each succeeds at its first try."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        with holding(target, lock.format(schema=f'"{target.schema}"', table=table)):
            runs = [threads.submit(run, *job) for job in jobs]
            eventually(lambda: waiting(target) == len(jobs))
        done = [future.result() for future in runs]
    assert [(one.error, one.tries) for one in done] == [(None, 1)] * len(jobs)
    return done


def each_once(target: Target, table: str = "events", key: str = "uuid") -> int:
    """The rows of a table, none of which is there twice."""
    [(rows, different)] = target.rows(f"SELECT count(*), count(DISTINCT {key}) FROM {table}")
    assert rows == different
    return int(rows)


def in_ledger(target: Target) -> list[tuple[str, datetime, datetime, int]]:
    """Export, bounds and rows at the source of each interval that had rows."""
    return target.rows(
        "SELECT export, interval_start, interval_end, rows_at_source FROM pg_exports_ledger"
        " WHERE rows_at_source > 0 ORDER BY export, interval_start, interval_end"
    )


def make_table(run: RunExport, export: PostgresExport, before: datetime) -> None:
    """By a run of an interval without rows."""
    assert run(export, partition_key(before - 20 * HOUR)).error is None


# The same interval, and intervals that overlap


@pytest.mark.parametrize("times", [2, 4])
def test_an_interval_that_is_run_several_times_at_the_same_moment_is_written_by_one_run_and_found_by_the_others(
    source: Source, target: Target, run: RunExport, hour: datetime, times: int
) -> None:
    source.insert("events", *(event(hour) for _ in range(50)))
    export = export_of("events", target, hour)
    make_table(run, export, hour)
    done = at_once(target, run, *[(export, partition_key(hour))] * times)
    assert sorted(one.counts for one in done) == [(0, 0, 50)] * (times - 1) + [(50, 0, 0)]
    assert each_once(target) == 50
    assert in_ledger(target) == [("events", hour, hour + HOUR, 50)]
    assert target.rows("SELECT sum(octet_length(keys)) / 8 FROM pg_exports_keys") == [(50,)]


@pytest.mark.parametrize("deduplicate", ["interval", "table"])
def test_a_schedules_hours_beside_a_backfill_and_a_daily_export_of_the_same_day_leave_each_row_once(
    source: Source, target: Target, run: RunExport, day: datetime, deduplicate: str
) -> None:
    hours = [day + n * HOUR for n in range(4)]
    rows = [event(hour, event=f"{n}") for hour in hours for n in range(5)]
    source.insert("events", *rows)
    if deduplicate == "table":
        again = [row | {"inserted_at": day + n * HOUR, "_timestamp": day + n * HOUR} for n, row in enumerate(rows[:4])]
        source.insert("events", *again)
    settings: dict[str, Any] = {"table": "events", "deduplicate": deduplicate}
    hourly = export_of("events", target, day, **settings)
    daily = export_of("events", target, day, name="daily", interval="day", start=day.date(), **settings)
    done = at_once(
        target,
        run,
        (hourly, partition_key(hours[0]), partition_key(hours[-1])),
        *((hourly, partition_key(hour)) for hour in hours[1:]),
        (daily, f"{day:%Y-%m-%d}"),
        lock=CREATING,
    )
    assert each_once(target) == sum(one.counts[0] for one in done) == 20
    assert [entry[:3] for entry in in_ledger(target)] == [
        ("daily", day, day + timedelta(days=1)),
        *(("events", hour, hour + HOUR) for hour in hours),
    ]


def test_an_export_that_changes_from_hours_to_days_and_back_while_its_old_runs_go_on_keeps_each_row_once(
    source: Source, target: Target, run: RunExport, day: datetime
) -> None:
    source.insert("events", *(event(day + n * HOUR) for n in range(6)))
    by_hour = export_of("events", target, day)
    by_day = export_of("events", target, day, interval="day", start=day.date())
    key = f"{day:%Y-%m-%d}"
    first = [(by_hour, partition_key(day)), (by_hour, partition_key(day + HOUR)), (by_day, key)]
    at_once(target, run, *first, lock=CREATING)
    assert each_once(target) == 6
    source.insert("events", event(day + HOUR), event(day + 2 * HOUR))
    at_once(target, run, (by_day, key), (by_hour, partition_key(day + HOUR)), (by_hour, partition_key(day + 2 * HOUR)))
    assert each_once(target) == 8
    assert run(by_hour, partition_key(day), partition_key(day + 5 * HOUR)).counts == (0, 0, 8)


# Several exports of one table


def test_exports_of_different_events_into_one_table_at_the_same_moment_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "abcd" for _ in range(10)))
    exports = [
        export_of("events", target, hour, name=f"e{n}", table="events", include_events=list(names))
        for n, names in enumerate(("ab", "bc", ""))
    ]
    done = at_once(target, run, *((export, partition_key(hour)) for export in exports), lock=CREATING)
    assert each_once(target) == sum(one.counts[0] for one in done) == 40
    assert [(name, rows) for name, _, _, rows in in_ledger(target)] == [("e0", 20), ("e1", 20), ("e2", 40)]
    source.insert("events", *(event(hour, event=name) for name in "abcd"))
    done = at_once(target, run, *((export, partition_key(hour)) for export in exports))
    assert each_once(target) == 40 + sum(one.counts[0] for one in done) == 44


def test_exports_of_one_table_that_are_materialised_by_one_run_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "ab"))
    first, second = (
        export_of("events", target, hour, name=name, table="events", include_events=[name]) for name in "ab"
    )
    for rows in (2, 4):
        done = run(first, partition_key(hour), downstream=assets_of(second))
        assert done.error is None
        assert each_once(target) == rows
        source.insert("events", *(event(hour, event=name) for name in "ab"))


def assets_of(export: PostgresExport) -> Sequence[dg.AssetsDefinition]:
    return [asset for asset in export.build_defs(None).assets or [] if isinstance(asset, dg.AssetsDefinition)]


def test_what_one_export_finds_in_a_table_whose_keys_were_pruned_does_not_stand_for_the_rows_of_another(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "ab"))
    export = export_of("events", target, hour)
    others = [
        export_of("events", target, hour, name="other", table="events", include_events=["a"]),
        export_of("events", target, hour, include_events=["a"]),
    ]
    run(export, partition_key(hour))
    for n, other in enumerate(others):
        target.execute("DELETE FROM pg_exports_keys")
        source.insert("events", event(hour, event="a"))
        assert run(other, partition_key(hour)).counts == (1, 0, 1 + 2 * n)
        source.insert("events", event(hour, event="a"), event(hour, event="b"))
        run(export, partition_key(hour))
        assert each_once(target) == 5 + 3 * n


def test_what_one_export_finds_in_a_table_with_a_truncated_partition_does_not_stand_for_the_rows_of_another(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "ab"))
    target.execute(
        "CREATE TABLE events (uuid uuid, event text, distinct_id text, team_id bigint) PARTITION BY LIST (event)",
        "CREATE TABLE events_a PARTITION OF events FOR VALUES IN ('a')",
        "CREATE TABLE events_b PARTITION OF events FOR VALUES IN ('b')",
        f"GRANT INSERT, SELECT ON events, events_a, events_b TO {ROLE}",
    )
    export = export_of("events", target, hour)
    other = export_of("events", target, hour, name="other", table="events", include_events=["a"])
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    target.execute("TRUNCATE events_b")
    assert run(other, partition_key(hour)).counts == (0, 0, 1)
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    assert each_once(target) == 2


# First runs, which make the tables


@pytest.mark.parametrize(("model", "key"), [("events", "uuid"), ("persons", "distinct_id")])
def test_eight_first_runs_of_four_hours_at_the_same_moment_make_the_tables_once(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str, key: str
) -> None:
    hours = [hour - n * HOUR for n in range(4)]
    source.insert("events", *(event(at) for at in hours))
    source.insert("person", *(person(at, uuid.UUID(int=n), 1) for n, at in enumerate(hours)))
    source.insert("person_distinct_id2", *(mapping(at, f"{n}", uuid.UUID(int=n)) for n, at in enumerate(hours)))
    export = export_of(model, target, hour)
    done = at_once(target, run, *((export, partition_key(at)) for at in hours * 2), lock=CREATING)
    assert each_once(target, model, key) == sum(one.counts[0] for one in done) == 4
    assert in_ledger(target) == [(model, at, at + HOUR, 1) for at in reversed(hours)]


# Merges


@pytest.mark.parametrize(("model", "key"), [("persons", "distinct_id"), ("sessions", "session_id")])
def test_runs_of_two_hours_that_merge_the_same_rows_at_the_same_moment_leave_each_in_its_latest_state(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str, key: str
) -> None:
    """Both are held in the midst of their merges, by a lock on the row that comes last."""
    people = [uuid.UUID(int=n) for n in range(20)]
    sessions = [new_session(hour - 3 * HOUR + timedelta(seconds=n)) for n in range(20)]
    hours = [hour - 2 * HOUR, hour - HOUR, hour]

    def fill(version: int) -> None:
        at = hours[version]
        if model == "persons":
            source.insert("person", *(person(at, one, version) for one in people))
            source.insert("person_distinct_id2", *(mapping(at, f"{one.int}", one, version) for one in people))
        else:
            insert_sessions(source, *(session(one, at) for one in sessions))

    export = export_of(model, target, hour)
    fill(0)
    assert run(export, partition_key(hours[0])).counts == (20, 0, 0)
    with ThreadPoolExecutor(2) as threads:
        with holding(target, f"SELECT FROM {model} WHERE {key} = (SELECT max({key}) FROM {model}) FOR UPDATE"):
            runs = []
            for version in (1, 2):
                fill(version)
                runs.append(threads.submit(run, export, partition_key(hours[version])))
                eventually(lambda: waiting(target) == len(runs))
        done = [future.result() for future in runs]
    assert [(one.error, one.tries, one.counts) for one in done] == [(None, 1, (0, 20, 0))] * 2
    assert each_once(target, model, key) == 20
    latest = "min(person_version)" if model == "persons" else "min(end_timestamp)"
    assert target.rows(f"SELECT {latest} FROM {model}") == [(2 if model == "persons" else hour,)]
    assert [entry[1] for entry in in_ledger(target)] == hours


# Tables that change while a run waits


@pytest.fixture
def loaded(source: Source, target: Target, run: RunExport, hour: datetime) -> PostgresExport:
    """An export that has one hour with two rows in its table."""
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    return export


SWAP = [
    "ALTER TABLE events RENAME TO old_events",
    "CREATE TABLE events (LIKE old_events)",
    f"GRANT INSERT, SELECT ON events TO {ROLE}",
]


@pytest.mark.parametrize("statements", [["TRUNCATE events"], SWAP], ids=["truncated", "replaced by another"])
def test_a_table_that_is_emptied_while_a_run_waits_for_it_is_loaded_afresh_by_that_run(
    target: Target, run: RunExport, hour: datetime, loaded: PostgresExport, statements: list[str]
) -> None:
    with ThreadPoolExecutor() as threads:
        with holding(target, THE_TABLE.format(schema=f'"{target.schema}"', table="events")) as execute:
            future = threads.submit(run, loaded, partition_key(hour))
            eventually(lambda: waiting(target) == 1)
            for statement in statements:
                execute(statement)
        done = future.result()
    assert (done.error, done.tries) == (None, 1)
    assert done.counts == (2, 0, 0)
    assert each_once(target) == 2


def test_a_table_that_is_dropped_while_a_run_waits_for_it_fails_that_run_and_is_made_again_by_the_next(
    target: Target, run: RunExport, hour: datetime, loaded: PostgresExport
) -> None:
    with ThreadPoolExecutor() as threads:
        with holding(target, THE_TABLE.format(schema=f'"{target.schema}"', table="events")) as execute:
            future = threads.submit(run, loaded, partition_key(hour))
            eventually(lambda: waiting(target) == 1)
            execute("DROP TABLE events")
        assert "does not exist" in (future.result().error or "")
    assert run(loaded, partition_key(hour)).counts == (2, 0, 0)


def test_rows_that_another_session_has_not_committed_yet_do_not_count_as_there(
    source: Source, target: Target, run: RunExport, hour: datetime, loaded: PostgresExport
) -> None:
    source.insert("events", event(hour))
    with holding(target, "INSERT INTO events SELECT * FROM events"):
        assert run(loaded, partition_key(hour)).counts == (1, 0, 2)


def test_an_interval_of_a_run_that_tries_again_may_have_been_written_by_another_run_in_between(
    source: Source, target: Target, run: RunExport, hour: datetime, loaded: PostgresExport
) -> None:
    """The first run commits `before` and fails in `hour`; the second one adds to `before`; so does the first one then."""
    before = hour - HOUR
    source.insert("events", event(before), event(hour))
    target.execute(
        "CREATE SEQUENCE tries",
        f"""
        CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            IF new.interval_start = '{hour}' AND nextval('"{target.schema}".tries') = 1 THEN
                PERFORM pg_advisory_xact_lock(20261102);
                RAISE 'not now' USING ERRCODE = 'serialization_failure';
            END IF;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER fail_once BEFORE INSERT ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION fail_once()",
    )
    with ThreadPoolExecutor() as threads:
        with holding(target, "SELECT pg_advisory_xact_lock(20261102)"):
            first = threads.submit(run, loaded, partition_key(before), partition_key(hour))
            eventually(lambda: waiting(target) == 1)
            source.insert("events", event(before))
            assert run(loaded, partition_key(before)).counts == (1, 0, 1)
            source.insert("events", event(before))
        done = first.result()
    assert (done.error, done.tries) == (None, 2)
    assert done.metadata[partition_key(before)]["rows_inserted"] == 1
    assert each_once(target) == 6
