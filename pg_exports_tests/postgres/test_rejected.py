"""Rejected rows are kept, however many, each once."""

from datetime import UTC, datetime, timedelta

import pytest

from pg_exports.interval import Interval
from pg_exports.models.events import EVENTS
from pg_exports.postgres import rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.bad_rows import BadRow, Fault
from pg_exports.postgres.table import Destination
from pg_exports_tests.conftest import Target

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
INTERVAL = Interval("2026-01-31-12:00", START, START + timedelta(hours=1))


def keep(target: Target, *rows: BadRow) -> None:
    with target.resource().session() as session:
        table = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
        rejected.ensure(session, target.schema)
        with session.transaction():
            rejected.keep(session, table, "events", INTERVAL, "run", rows)


def bad(n: int, column: str | None = None, reason: str = "too long") -> BadRow:
    return BadRow(
        f'{{"uuid": "{n}"}}', Fault(column, reason), f'{{"uuid": "{n}", "event": "a\\u0000, \\udcff, NULL, {{"}}'
    )


def test_the_same_row_twice_is_kept_once_with_its_last_reason(target: Target) -> None:
    keep(target, bad(1), bad(2, "event"), bad(1, "event", "no"))
    keep(target, bad(2))
    assert target.rows("SELECT key->>'uuid', column_name, reason FROM pg_exports_rejected ORDER BY 1") == [
        ("1", "event", "no"),
        ("2", None, "too long"),
    ]


def test_more_rows_than_a_statement_takes_are_kept_as_they_were(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejected, "BATCH_BYTES", 60_000)
    rows = [bad(n, "event" if n % 2 else None) for n in range(2 * rejected.BATCH_ROWS + 1)]
    keep(target, *rows)
    kept = target.rows("SELECT key::text, column_name, reason, row_as_it_was FROM pg_exports_rejected")
    assert sorted(kept) == sorted((row.key, row.fault.column, row.fault.reason, row.row) for row in rows)
