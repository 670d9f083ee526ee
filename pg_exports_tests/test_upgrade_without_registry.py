"""An upgrade from the last version without a registry of tables: its tables, ledger, journals and rejected rows serve on.

What it wrote is in `recorded/without_registry.json`. It is restored with the times of insertion moved to hours of today.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pg_exports_tests import recorded
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.recorded import BAD, EXPORTS, ROWS, export_of
from pg_exports_tests.source_rows import HOUR
from pg_exports_tests.test_late_rows import asked

RECORDED = json.loads((Path(recorded.__file__).parent / "without_registry.json").read_text())

EVENTS = ("events", "by_month", "streamed", "compared")
APPENDED = (*EVENTS, "readings")
MERGED = ("persons", "sessions", "visits")

KEY = dict.fromkeys(EVENTS, "uuid") | {
    "persons": "distinct_id",
    "sessions": "session_id",
    "readings": "number",
    "visits": "id",
}

each_export = pytest.mark.parametrize("name", EXPORTS)

LATE = 500
"""The number of a row that comes after the upgrade."""


@pytest.fixture
def upgraded(source: Source, target: Target, hour: datetime) -> Target:
    """What the earlier version left, and the rows for which it did."""
    recorded.create(source)
    recorded.fill(source, hour)
    target.execute("\n".join(RECORDED["schema"]).replace("{schema}", target.schema))
    for table, rows in RECORDED["rows"].items():
        fill(target, table, rows, hour)
    numbers = dict(
        target.rows(f"SELECT relname, oid::bigint FROM pg_class WHERE relnamespace = '{target.schema}'::regnamespace")
    )
    files = dict(
        target.rows(
            f"SELECT relname, relfilenode::bigint FROM pg_class WHERE relnamespace = '{target.schema}'::regnamespace"
        )
    )
    leaves = ",".join(str(files[leaf]) for leaf in ("november", "others"))
    for name in EXPORTS:
        here = f"table_oid = {numbers[name]}, table_filenode = {files[name]}"
        target.execute(
            f"UPDATE pg_exports_ledger SET {here} WHERE destination = '{name}'",
            f"UPDATE pg_exports_keys SET {here} WHERE destination = '{name}'",
        )
    target.execute(f"UPDATE pg_exports_ledger SET partition_filenodes = '{{{leaves}}}' WHERE destination = 'by_month'")
    return target


def fill(target: Target, table: str, rows: list[dict[str, Any]], hour: datetime) -> None:
    """Restore a table's rows, those of the bookkeeping with times of today."""
    text = json.dumps(rows).replace("'", "''")
    columns = ", ".join(f'"{name}"' for name in rows[0])
    target.execute(
        f"INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE"
        f" SELECT {columns} FROM json_populate_recordset(NULL::{table}, '{text}')"
    )
    if table.startswith("pg_exports_"):
        moved = f"interval '{hour - datetime.fromisoformat(RECORDED['hour'])}'"
        for end in ("start", "end"):
            target.execute(f"UPDATE {table} SET interval_{end} = interval_{end} + {moved}")


def hold_each_once(target: Target, name: str, rows: int) -> bool:
    return target.rows(f"SELECT count(*), count(DISTINCT {KEY[name]}) FROM {name}") == [(rows, rows)]


def counted(done: Run, name: str) -> tuple[int, int]:
    """Rows inserted and rows that were there. Of sessions the earlier version had '' for what is NULL now: it is updated."""
    inserted, updated, unchanged = done.counts
    assert updated == 0 or name == "sessions"
    return inserted, updated + unchanged


def nothing(target: Target, name: str) -> None: ...


def vacuum(target: Target, name: str) -> None:
    target.execute(f"VACUUM FULL {name}")


@each_export
@pytest.mark.parametrize("before", [nothing, vacuum], ids=["as it was", "rewritten before the first run"])
@pytest.mark.parametrize("after", [nothing, vacuum], ids=["", "rewritten after the first run"])
def test_nothing_lands_twice_and_what_is_late_lands(
    source: Source,
    upgraded: Target,
    run: RunExport,
    hour: datetime,
    name: str,
    before: Callable[[Target, str], None],
    after: Callable[[Target, str], None],
) -> None:
    export = export_of(name, upgraded, hour)
    earlier, later, newest = (partition_key(each) for each in (hour - HOUR, hour, hour + HOUR))
    before(upgraded, name)
    recorded.insert(source, LATE, hour + HOUR)
    assert counted(run(export, newest), name) == (1, 0)
    assert asked(export, source, upgraded) == []
    assert counted(run(export, earlier, later), name) == (0, 2 * ROWS)
    assert counted(run(export, earlier), name) == (0, ROWS)
    after(upgraded, name)
    recorded.insert(source, LATE + 1, hour)
    assert counted(run(export, earlier, newest), name) == (1, 2 * ROWS + 1)
    assert asked(export, source, upgraded) == []
    recorded.insert(source, LATE + 2, hour - HOUR)
    assert asked(export, source, upgraded) == [earlier]
    assert counted(run(export, earlier), name) == (1, ROWS)
    assert asked(export, source, upgraded) == []
    assert hold_each_once(upgraded, name, 2 * ROWS + 3)


@each_export
def test_the_first_tick_requests_the_intervals_with_late_rows_alone(
    source: Source, upgraded: Target, run: RunExport, hour: datetime, name: str
) -> None:
    export = export_of(name, upgraded, hour)
    assert asked(export, source, upgraded) == []
    recorded.insert(source, LATE, hour - HOUR)
    # The earlier version kept no states of merged rows: of these intervals it is known once they have run again.
    assert asked(export, source, upgraded) == ([partition_key(hour - HOUR)] if name in APPENDED else [])
    assert counted(run(export, partition_key(hour - HOUR)), name) == (1, ROWS)
    assert asked(export, source, upgraded) == []


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("statement", ["", "VACUUM FULL {}"], ids=["as it was", "rewritten"])
def test_rows_deleted_by_hand_before_stay_deleted(
    upgraded: Target, run: RunExport, hour: datetime, name: str, statement: str
) -> None:
    export = export_of(name, upgraded, hour)
    assert counted(run(export, partition_key(hour)), name) == (0, ROWS)
    upgraded.execute(f"DELETE FROM {name} WHERE {KEY[name]} IN (SELECT max({KEY[name]}) FROM {name})")
    upgraded.execute(*filter(None, [statement.format(name)]))
    assert counted(run(export, partition_key(hour - HOUR), partition_key(hour)), name) == (0, 2 * ROWS)
    assert hold_each_once(upgraded, name, 2 * ROWS - 1)


@pytest.mark.parametrize("name", APPENDED)
def test_rows_copied_in_by_hand_before_do_not_land_twice(
    source: Source, upgraded: Target, run: RunExport, hour: datetime, name: str
) -> None:
    newest = partition_key(hour + HOUR)
    for number in (LATE, LATE + 1):
        recorded.insert(source, number, hour + HOUR)
    copy = export_of(name, upgraded, hour, name="copied", table="copied")
    assert counted(run(copy, newest), name) == (2, 0)
    [(columns,)] = upgraded.rows(
        "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute"
        f" WHERE attrelid = '{name}'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    upgraded.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM copied LIMIT 1")
    assert counted(run(export_of(name, upgraded, hour), newest), name) == (1, 1)
    assert hold_each_once(upgraded, name, 2 * ROWS + 2)


@pytest.mark.parametrize("name", BAD)
def test_rejected_rows_are_resolved_when_they_land(upgraded: Target, run: RunExport, hour: datetime, name: str) -> None:
    export = export_of(name, upgraded, hour)
    unresolved = f"SELECT count(*) FROM pg_exports_rejected WHERE export = '{name}' AND resolved_at IS NULL"
    assert counted(run(export, partition_key(hour)), name) == (0, ROWS)
    assert upgraded.rows(unresolved) == [(1,)]
    column, kind = ("person_version", "bigint") if name == "persons" else ("event", "text")
    upgraded.execute(f"ALTER TABLE {name} ALTER COLUMN {column} TYPE {kind}")
    assert counted(run(export, partition_key(hour)), name) == (1, ROWS)
    assert upgraded.rows(unresolved) == [(0,)]
    assert hold_each_once(upgraded, name, 2 * ROWS + 1)
