"""Rows in their latest state: a run that read the source earlier never overwrites what one that read it later has merged."""

import contextlib
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports.sandbox import postgres_server
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import HOUR, export_of, insert_sessions, mapping, new_session, person, session

MINUTE = timedelta(minutes=1)

VISITS: Any = {
    "name": "visits",
    "query": "SELECT id, state, at FROM visits WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"id": "BIGINT", "state": "TEXT", "at": "TIMESTAMPTZ"},
    "key": ["id"],
    "version": ["at"],
}


@contextlib.contextmanager
def merging(run: RunExport, export: PostgresExport, key: str, target: Target, held: str) -> Iterator["Future[Run]"]:
    """A run that has read its rows and waits in its merge for a row (a condition) that is held until the block ends."""
    table = export.destination.table
    with (
        ThreadPoolExecutor(1) as threads,
        postgres_server.admin(target.sandbox.postgres, DATABASE) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("BEGIN")
        cursor.execute(f'SELECT FROM "{target.schema}"."{table}" WHERE {held} FOR UPDATE')
        assert cursor.rowcount == 1
        try:
            running = threads.submit(run, export, key)
            eventually(
                lambda: (
                    running.done()
                    or bool(
                        target.rows(
                            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO%'"
                            f" AND query LIKE '%{target.schema}%'"
                        )
                    )
                )
            )
            assert not running.done()
            yield running
        finally:
            cursor.execute("ROLLBACK")


def test_a_session_read_before_more_of_it_came_does_not_overwrite_what_was_read_after(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    held, both = sorted(new_session(hour) for _ in range(2))
    pages = [uuid.uuid4() for _ in range(3)]
    end = hour + 30 * MINUTE
    for one in (held, both):
        insert_sessions(source, session(one, hour + MINUTE, started=hour, ended=end, pageviews=pages[:1]))
    export = export_of("sessions", target, hour)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    for one in (held, both):
        insert_sessions(source, session(one, hour + 2 * MINUTE, started=hour, ended=end, pageviews=pages[1:2]))
    with merging(run, export, partition_key(hour), target, f"session_id = '{held}'") as earlier:
        # An older event: the session's end stays, and it counts in the next hour.
        insert_sessions(source, session(both, hour + HOUR, started=hour, ended=end, pageviews=pages[2:]))
        assert run(export, partition_key(hour + HOUR)).counts == (0, 1, 0)
    assert earlier.result().error is None
    counts = dict(target.rows("SELECT session_id, pageview_count FROM sessions"))
    assert counts == {str(held): 2, str(both): 3}


def test_a_run_whose_rows_another_one_has_merged_meanwhile_reads_them_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """The other one read them before: what it has merged is the older state."""
    held, both = uuid.UUID(int=1), uuid.UUID(int=2)
    for one in (held, both):
        source.insert("person", person(hour, one, 1))
        source.insert("person_distinct_id2", mapping(hour, one.hex, one))
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    source.insert("person", *(person(hour, one, 1, properties='{"a": 1}', _offset=1) for one in (held, both)))
    with merging(run, export, partition_key(hour), target, f"distinct_id = '{held.hex}'") as earlier:
        source.insert("person", person(hour + HOUR, both, 1, properties='{"a": 2}', _offset=2))
        assert run(export, partition_key(hour + HOUR)).counts == (0, 1, 0)
    ran = earlier.result()
    assert ran.error is None
    assert any("is read again" in line for line in ran.log)
    assert dict(target.rows("SELECT distinct_id, properties->>'a' FROM persons")) == {held.hex: "1", both.hex: "2"}
    assert ran.counts == (0, 1, 1)


def test_of_a_persons_equal_versions_the_later_one_lands_in_one_interval_and_over_two(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    one = uuid.UUID(int=1)
    source.execute("SYSTEM STOP MERGES person")
    source.insert("person_distinct_id2", mapping(hour, "a", one))
    for offset, name in ((2, "second"), (3, "third"), (1, "first")):
        source.insert("person", person(hour, one, 1, properties=f'{{"name": "{name}"}}', _offset=offset))
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert target.rows("SELECT properties->>'name' FROM persons") == [("third",)]
    source.insert("person", person(hour + HOUR, one, 1, properties='{"name": "fourth"}'))
    assert run(export, partition_key(hour + HOUR)).counts == (0, 1, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert target.rows("SELECT properties->>'name' FROM persons") == [("fourth",)]


@pytest.mark.parametrize("how", ["one run", "two runs"])
def test_of_an_own_models_rows_of_one_key_the_latest_of_all_intervals_lands(
    source: Source, target: Target, run: RunExport, hour: datetime, how: str
) -> None:
    source.execute(
        "CREATE TABLE visits (id Int64, state String, at DateTime64(6, 'UTC'), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY id"
    )
    rows = [(1, "first", 0, 0), (1, "second", 1, 1), (2, "only", 0, 0), (3, "newer", 2, 0), (3, "older", 1, 1)]
    for one, state, version, interval in rows:
        at, inserted_at = hour + version * MINUTE, hour + interval * HOUR
        source.insert("visits", {"id": one, "state": state, "at": at, "inserted_at": inserted_at})
    export = PostgresExport(model=VISITS, start=hour, schema=target.schema)
    first, last = partition_key(hour), partition_key(hour + HOUR)
    if how == "one run":
        assert run(export, first, last).error is None
    else:
        for key in (last, first):
            assert run(export, key).error is None
    assert dict(target.rows("SELECT id, state FROM visits")) == {1: "second", 2: "only", 3: "newer"}
