"""A table that an earlier version has filled is gone on with: nothing lands twice, and late rows land.

`recorded/version_0_1_0.json` has the ledger and the key journals that version 0.1.0 wrote for the rows below, once under
ClickHouse's defaults and once under a profile with `date_time_output_format = 'iso'`, which it followed in its identities.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports_tests.conftest import RunExport, Source, Target
from pg_exports_tests.source_rows import HOUR
from pg_exports_tests.test_late_rows import asked

START = datetime(2026, 11, 20, 10, tzinfo=UTC)
KEY = "2026-11-20-10:00"
EMPTY = "2026-11-20-09:00"
ROWS = 12

READINGS = {
    "name": "readings",
    "query": "SELECT sensor, at, value FROM readings WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"sensor": "TEXT", "at": "TIMESTAMPTZ", "value": "TEXT"},
    "key": ["sensor", "at", "value"],
}

_READING = (
    "'sensor ' || toString(number % 3), toDateTime('2026-11-20 10:00:00', 'UTC') + number * 60,"
    " if(number % 4 = 0, NULL, toString(number)), toDateTime64('2026-11-20 10:30:00', 6, 'UTC')"
)
_EVENT = (
    "toUUID('00000000-0000-4000-8000-0000000000' || leftPad(toString(number), 2, '0')), '$pageview', '{}',"
    " toDateTime64('2026-11-20 10:10:00', 6, 'UTC'), 1, toString(number), toDateTime('2026-11-20 10:30:00', 'UTC'),"
    " toDateTime64('2026-11-20 10:30:00', 6, 'UTC')"
)

LANDED = {
    "readings": "INSERT INTO readings SELECT 'sensor ' || number % 3, timestamptz '2026-11-20 10:00 UTC'"
    " + number * interval '1 minute', CASE WHEN number % 4 > 0 THEN number::text END FROM generate_series(0, 11) AS number",
    "events": "INSERT INTO events (uuid, event, properties, elements, distinct_id, team_id, timestamp)"
    " SELECT '00000000-0000-4000-8000-0000000000' || lpad(number::text, 2, '0'), '$pageview', '{}', '\"\\\"\\\"\"',"
    " number::text, 1, '2026-11-20 10:10 UTC' FROM generate_series(0, 11) AS number",
}
"""What the earlier version has landed."""


def insert(source: Source, name: str, first: int, count: int) -> None:
    numbers = f"(SELECT number + {first} AS number FROM numbers({count}))"
    if name == "readings":
        source.execute(f"INSERT INTO readings SELECT {_READING} FROM {numbers}")
        return
    columns = "uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at"
    source.execute(f"INSERT INTO events ({columns}) SELECT {_EVENT} FROM {numbers}")


def export_of(name: str, target: Target) -> PostgresExport:
    model: Any = READINGS if name == "readings" else name
    team_id = 1 if name == "events" else None
    return PostgresExport(model=model, team_id=team_id, start=START - timedelta(days=1), schema=target.schema)


def restore(target: Target, name: str, profile: str) -> None:
    """Leave table, ledger and journals as the earlier version left them, in the tables that are there."""
    recorded = json.loads((Path(__file__).parent / "recorded" / "version_0_1_0.json").read_text())[profile]
    [(oid, filenode)] = target.rows(
        f"SELECT oid::bigint, relfilenode::bigint FROM pg_class WHERE oid = '{name}'::regclass"
    )
    here = {"table_oid": oid, "table_filenode": filenode}
    # It had no registry.
    target.execute(LANDED[name], "DROP TABLE pg_exports_tables")
    for row in recorded["ledger"]:
        if row["export"] == name:
            text = json.dumps(row | here).replace("'", "''")
            target.execute(
                f"INSERT INTO pg_exports_ledger SELECT * FROM json_populate_record(NULL::pg_exports_ledger, '{text}')"
            )
    columns = "destination, table_oid, table_filenode, team_id, interval_start, interval_end, export, run_id"
    for row in recorded["keys"]:
        if row["export"] == name:
            text = json.dumps({key: value for key, value in (row | here).items() if key != "keys"}).replace("'", "''")
            target.execute(
                f"INSERT INTO pg_exports_keys ({columns}, keys) SELECT {columns}, decode('{row['keys']}', 'hex')"
                f" FROM json_populate_record(NULL::pg_exports_keys, '{text}')"
            )


@pytest.mark.parametrize("profile", ["default", "iso"])
@pytest.mark.parametrize("name", ["readings", "events"])
def test_a_table_that_an_earlier_version_filled_takes_late_rows_and_nothing_twice(
    source: Source, target: Target, run: RunExport, name: str, profile: str
) -> None:
    source.execute(
        "CREATE TABLE readings (sensor String, at DateTime, value Nullable(String), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY sensor"
    )
    export = export_of(name, target)
    assert run(export, EMPTY).counts == (0, 0, 0)
    insert(source, name, 0, ROWS)
    restore(target, name, profile)
    assert run(export, KEY).counts == (0, 0, ROWS)
    assert run(export, KEY).counts == (0, 0, ROWS)
    insert(source, name, ROWS, 1)
    assert run(export, KEY).counts == (1, 0, ROWS)
    assert run(export, EMPTY, KEY).counts == (0, 0, ROWS + 1)
    assert target.count(name) == ROWS + 1


def test_the_late_rows_sensor_does_not_take_an_earlier_versions_fingerprints_for_late_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute(
        "CREATE TABLE readings (sensor String, at DateTime, value Nullable(String), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY sensor"
    )
    start = hour - 24 * HOUR
    model: Any = READINGS
    export = PostgresExport(model=model, start=start, schema=target.schema)
    source.insert("readings", {"sensor": "a", "at": hour, "value": "1", "inserted_at": hour})
    assert run(export, f"{hour:%Y-%m-%d-%H:%M}").counts == (1, 0, 0)
    target.execute("UPDATE pg_exports_ledger SET fingerprint = '1:0123456789abcdef:0123456789abcdef:5f0e6913'")
    assert asked(export, source, target) == []
    source.insert("readings", {"sensor": "b", "at": hour, "value": "1", "inserted_at": hour})
    assert asked(export, source, target) == [f"{hour:%Y-%m-%d-%H:%M}"]
