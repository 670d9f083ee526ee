"""Which errors a run outlives by trying again, how often and when; and which ones fail it at once, with what to do."""

import dataclasses
import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import polars as pl
import pytest

from pg_exports import PostgresExport
from pg_exports.models import MODELS
from pg_exports.postgres import io_manager
from pg_exports.postgres.io_manager import RETRIES
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import HOUR, event, export_of
from pg_exports_tests.test_concurrency import holding, waiting

ALL_TRIES = 1 + RETRIES.max_retries


@pytest.fixture
def export(source: Source, target: Target, hour: datetime) -> PostgresExport:
    """An export of one hour with three events."""
    source.insert("events", *(event(hour) for _ in range(3)))
    return export_of("events", target, hour)


def landed(target: Target) -> tuple[int, int]:
    """Events, and how many different ones."""
    [row] = target.rows("SELECT count(*), count(DISTINCT uuid) FROM events")
    return row[0], row[1]


# When


def test_the_tries_take_about_a_minute_and_wait_longer_each_time_by_chance_not_all_at_the_same_moment() -> None:
    waits = [RETRIES._replace(jitter=None).calculate_delay(n) for n in range(1, ALL_TRIES)]
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(waits))
    assert 45 <= sum(waits) <= 90
    assert statistics.stdev(RETRIES.calculate_delay(3) for _ in range(20)) > 0.1


def test_a_server_that_is_down_is_asked_again_after_longer_and_longer_waits(
    run: RunExport, target: Target, hour: datetime, export: PostgresExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = RETRIES._replace(delay=0.02)
    monkeypatch.setattr(io_manager, "RETRIES", quick)
    failed = run(export, partition_key(hour), postgres=target.resource(port=1))
    assert failed.error is not None
    assert "Is the server running" in failed.error
    assert failed.tries == ALL_TRIES
    waits = [event.step_retry_data.seconds_to_wait for event in failed.events if event.is_step_up_for_retry]
    expected = [quick._replace(jitter=None).calculate_delay(n) for n in range(1, ALL_TRIES)]
    assert waits != expected
    assert waits == pytest.approx(expected, abs=0.021)


# What passes: Postgres


def test_a_run_outlives_one_passing_error_of_postgres_after_the_other(
    target: Target, run: RunExport, hour: datetime, export: PostgresExport
) -> None:
    states = ["40001", "40P01", "53200", "55P03"]
    run(export, partition_key(hour - HOUR))
    raises = " ".join(f"WHEN {n} THEN RAISE 'fault' USING ERRCODE = '{state}';" for n, state in enumerate(states, 1))
    target.execute(
        "CREATE SEQUENCE tries",
        f"""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            CASE nextval('"{target.schema}".tries')
                {raises}
                WHEN {len(states) + 1} THEN PERFORM pg_terminate_backend(pg_backend_pid());
                ELSE
            END CASE;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER fail BEFORE INSERT ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    done = run(export, partition_key(hour))
    assert (done.error, done.tries) == (None, ALL_TRIES)
    assert done.counts == (3, 0, 0)
    assert landed(target) == (3, 3)


def test_a_run_that_is_the_victim_of_a_deadlock_tries_again(
    target: Target, run: RunExport, hour: datetime, export: PostgresExport
) -> None:
    run(export, partition_key(hour - HOUR))
    log = target.sandbox.postgres.log
    before = log.stat().st_size
    with ThreadPoolExecutor() as threads:
        # Of two that wait for each other the one whose time is up first is ended.
        with holding(target, "SET LOCAL deadlock_timeout = '1min'") as execute:
            execute("LOCK TABLE pg_exports_ledger IN EXCLUSIVE MODE")
            future = threads.submit(run, export, partition_key(hour))
            eventually(lambda: waiting(target) == 1)
            execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        done = future.result()
    assert (done.error, done.tries) == (None, 2)
    assert b"deadlock detected" in log.read_bytes()[before:]
    assert landed(target) == (3, 3)


def test_a_run_that_finds_no_connection_left_tries_again(
    target: Target, run: RunExport, hour: datetime, export: PostgresExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_manager, "RETRIES", RETRIES._replace(delay=0.5))
    server = target.sandbox.postgres
    before = server.log.stat().st_size
    server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    try:
        with ThreadPoolExecutor() as threads:
            future = threads.submit(run, export, partition_key(hour))
            eventually(lambda: b"too many connections for role" in server.log.read_bytes()[before:])
            server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
            done = future.result()
    finally:
        server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    assert done.error is None
    assert 1 < done.tries < ALL_TRIES
    assert landed(target) == (3, 3)


# What passes: ClickHouse


def poison(source: Source, code: int) -> None:
    """Have ClickHouse answer queries of events with an error, when there are rows to answer with."""
    source.execute("RENAME TABLE events TO all_events")
    source.execute(
        "CREATE VIEW events AS SELECT * REPLACE (if(uuid IS NULL, '', toString(throwIf(uuid IS NOT NULL, 'fault',"
        f" toInt32({code})))) AS distinct_id) FROM all_events SETTINGS allow_custom_error_code_in_throwif = 1"
    )


def heal(source: Source) -> None:
    source.execute("DROP VIEW events")
    source.execute("RENAME TABLE all_events TO events")


@pytest.mark.parametrize(("code", "tries"), [(202, ALL_TRIES), (395, 1)])
def test_an_error_of_clickhouses_is_tried_again_or_not_by_its_code(
    source: Source, target: Target, run: RunExport, hour: datetime, export: PostgresExport, code: int, tries: int
) -> None:
    poison(source, code)
    failed = run(export, partition_key(hour))
    assert failed.error is not None
    assert f"Code: {code}. DB::Exception:" in failed.error
    assert failed.tries == tries
    assert landed(target) == (0, 0)


def test_a_query_that_needs_more_memory_than_there_is_is_tried_again(
    source: Source, run: RunExport, hour: datetime, export: PostgresExport
) -> None:
    failed = run(export, partition_key(hour), clickhouse=source.resource(settings={"max_memory_usage": 1}))
    assert failed.error is not None
    assert "MEMORY_LIMIT_EXCEEDED" in failed.error
    assert failed.tries == ALL_TRIES


def test_a_run_outlives_a_passing_error_of_clickhouses(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    export: PostgresExport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(io_manager, "RETRIES", RETRIES._replace(delay=0.5))
    poison(source, 202)
    with ThreadPoolExecutor() as threads:
        future = threads.submit(run, export, partition_key(hour))
        eventually(lambda: failures(source) > 0)
        heal(source)
        done = future.result()
    assert done.error is None
    assert 1 < done.tries < ALL_TRIES
    assert landed(target) == (3, 3)


def failures(source: Source) -> int:
    """Queries that ClickHouse has answered with code 202."""
    source.execute("SYSTEM FLUSH LOGS")
    [(queries,)] = source.rows(
        "SELECT count() FROM system.query_log WHERE exception_code = 202 AND has(databases, {database:String})",
        {"database": source.database},
    )
    return int(queries)


# What does not pass

Break = Callable[[Source, Target], dict[str, Any]]
"""Breaks something for good; gives what the run needs beside its export and partition."""


def lacks_schema(source: Source, target: Target) -> dict[str, Any]:
    target.execute(f'REVOKE CREATE ON SCHEMA "{target.schema}" FROM {ROLE}')
    return {}


def lacks_table(source: Source, target: Target) -> dict[str, Any]:
    target.execute("CREATE TABLE events (uuid uuid)", f"GRANT SELECT ON events TO {ROLE}")
    return {}


def has_another_type(source: Source, target: Target) -> dict[str, Any]:
    target.execute("CREATE TABLE events (uuid uuid, event integer)", f"GRANT INSERT, SELECT ON events TO {ROLE}")
    return {}


def has_no_source_table(source: Source, target: Target) -> dict[str, Any]:
    source.execute("DROP TABLE events")
    return {}


def has_no_source_column(source: Source, target: Target) -> dict[str, Any]:
    source.execute("ALTER TABLE events DROP COLUMN person_properties")
    return {}


LASTING = [
    pytest.param(lambda _, target: {"postgres": target.resource(password="wrong")}, "POSTGRES_PASSWORD", id="password"),
    pytest.param(
        lambda _, target: {"postgres": target.resource(root_certificate="system")},
        "POSTGRES_ROOT_CERTIFICATE",
        id="identity of Postgres",
    ),
    pytest.param(lambda _, target: {"postgres": target.resource(host="a b")}, "POSTGRES_HOST", id="host"),
    pytest.param(lacks_schema, "GRANT USAGE, CREATE ON SCHEMA", id="privilege on the schema"),
    pytest.param(lacks_table, "GRANT INSERT, SELECT, UPDATE ON", id="privilege on the table"),
    pytest.param(has_another_type, "Column event", id="type"),
    pytest.param(has_no_source_table, "CLICKHOUSE_DATABASE", id="source table"),
    pytest.param(has_no_source_column, "A column is missing", id="source column"),
    pytest.param(
        lambda source, _: {"clickhouse": source.resource(password="wrong")}, "CLICKHOUSE_PASSWORD", id="its password"
    ),
    pytest.param(
        lambda source, _: {"clickhouse": source.resource(ca_certificate=None)},
        "CLICKHOUSE_CA_CERTIFICATE",
        id="identity of ClickHouse",
    ),
    pytest.param(
        lambda source, _: {"clickhouse": source.resource(settings={"no_such_setting": 1})}, "`settings`", id="settings"
    ),
]


@pytest.mark.parametrize(("break_it", "remedy"), LASTING)
def test_what_another_try_would_not_mend_fails_at_once_with_what_to_do(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    export: PostgresExport,
    break_it: Break,
    remedy: str,
) -> None:
    failed = run(export, partition_key(hour), **break_it(source, target))
    assert failed.error is not None
    assert remedy in failed.error
    assert failed.tries == 1


def with_finish(monkeypatch: pytest.MonkeyPatch, finish: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Have the model of events end on another step of its own."""
    monkeypatch.setitem(MODELS, "events", dataclasses.replace(MODELS["events"], finish=finish))


def test_an_error_that_nobody_has_foreseen_fails_at_once(
    target: Target, run: RunExport, hour: datetime, export: PostgresExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(frame: pl.DataFrame) -> pl.DataFrame:
        raise TypeError("a defect of a model's")

    with_finish(monkeypatch, finish)
    failed = run(export, partition_key(hour))
    assert failed.error == "TypeError: a defect of a model's"
    assert failed.tries == 1
    assert landed(target) == (0, 0)


def test_a_run_that_is_terminated_is_not_tried_again_and_shows_what_it_wrote(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    export: PostgresExport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source.insert("events", event(hour - HOUR))
    events = MODELS["events"]

    def finish(frame: pl.DataFrame) -> pl.DataFrame:
        if frame.height == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        return events.finish(frame)

    with_finish(monkeypatch, finish)
    terminated = run(export, partition_key(hour - HOUR), partition_key(hour))
    assert terminated.error is not None
    assert terminated.tries == 1
    assert terminated.shown == [partition_key(hour - HOUR)]
    assert landed(target) == (1, 1)
