"""What earlier versions have written, and the rows that it was written for.

`version_0_1_0.json` is described in `test_upgrade`. `without_registry.json` is all that the last version without a registry
of tables wrote for the rows that `fill` makes; `record.py` recorded it.
"""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pg_exports import PostgresExport
from pg_exports_tests.conftest import TEAM, Source, Target
from pg_exports_tests.source_rows import HOUR, event, insert_sessions, mapping, person, session

ROWS = 6
"""Good rows of each model in each of two hours."""

FIXED = datetime(2026, 11, 20, 10, tzinfo=UTC)
"""What stands in the rows. Only the times of insertion are others whenever they are inserted."""

READINGS: dict[str, Any] = {
    "name": "readings",
    "query": "SELECT sensor, number, value FROM readings"
    " WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"sensor": "TEXT", "number": "BIGINT", "value": "TEXT"},
    "key": ["sensor", "number"],
}
VISITS: dict[str, Any] = {
    "name": "visits",
    "query": "SELECT id, state, at FROM visits WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"id": "BIGINT", "state": "TEXT", "at": "TIMESTAMPTZ"},
    "key": ["id"],
    "version": ["at"],
}

EXPORTS: Mapping[str, Mapping[str, Any]] = {
    "events": {"model": "events"},
    "by_month": {"model": "events", "name": "by_month", "table": "by_month"},
    "streamed": {"model": "events", "name": "streamed", "table": "streamed", "streams": 3},
    "compared": {"model": "events", "name": "compared", "table": "compared", "deduplicate": "table"},
    "persons": {"model": "persons"},
    "sessions": {"model": "sessions"},
    "readings": {"model": READINGS, "team_id": None},
    "visits": {"model": VISITS, "team_id": None},
}
"""The settings of each export, by its name, which is its table's, too."""

BAD = ("events", "by_month", "streamed", "compared", "persons")
"""The exports of whose rows one cannot be held, in the second hour."""

PARTITIONED = (
    'CREATE TABLE by_month (uuid varchar(200), event varchar(200), properties jsonb, "timestamp" timestamptz,'
    ' distinct_id varchar(200), team_id int) PARTITION BY RANGE ("timestamp")',
    "CREATE TABLE november PARTITION OF by_month FOR VALUES FROM ('2026-11-01') TO ('2026-12-01')",
    "CREATE TABLE others PARTITION OF by_month DEFAULT",
)


def export_of(name: str, target: Target, hour: datetime, /, **changes: Any) -> PostgresExport:
    """One of the exports into the test's schema."""
    settings = {"team_id": TEAM, "schema": target.schema, "start": hour - 36 * HOUR, **EXPORTS[name], **changes}
    return PostgresExport(**settings)


def create(source: Source) -> None:
    """The tables of own models in ClickHouse."""
    source.execute(
        "CREATE TABLE readings (sensor Nullable(String), number UInt64, value String, inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY number"
    )
    source.execute(
        "CREATE TABLE visits (id UInt64, state String, at DateTime64(6, 'UTC'), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY id"
    )


def fill(source: Source, hour: datetime) -> None:
    """The rows of two hours, of which `hour` is the second one."""
    for first, moment in ((0, hour - HOUR), (ROWS, hour)):
        for number in range(first, first + ROWS):
            insert(source, number, moment)
    bad = uuid.UUID(int=900)
    source.insert("events", event(hour, uuid=bad, event="x" * 201, timestamp=FIXED))
    source.insert("person", person(hour, bad, 2**31, created_at=FIXED))
    source.insert("person_distinct_id2", mapping(hour, "bad", bad))


def insert(source: Source, number: int, moment: datetime) -> None:
    """A row of each model."""
    one, at = uuid.UUID(int=number), FIXED - timedelta(days=number)
    source.insert("events", event(moment, uuid=one, distinct_id=f"{number}", timestamp=at - timedelta(days=15)))
    source.insert("person", person(moment, one, 1, created_at=at))
    source.insert("person_distinct_id2", mapping(moment, f"{number}", one))
    milliseconds = int(FIXED.timestamp() * 1000)
    session_id = uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | number)
    insert_sessions(source, session(session_id, moment, started=FIXED, ended=FIXED))
    source.insert(
        "readings",
        {"sensor": f"s{number}" if number % 3 else None, "number": number, "value": "1", "inserted_at": moment},
    )
    source.insert("visits", {"id": number, "state": "a", "at": at, "inserted_at": moment})
