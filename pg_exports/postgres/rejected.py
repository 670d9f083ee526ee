"""Rejected rows: a table beside the destination keeps them with the reason, so that no row is dropped silently.

It is written in the interval's transaction. A row that a later run of the interval no longer rejects gets a
`resolved_at`. Keys are JSON and not JSONB, which has no NUL: it may be what is wrong with them.
"""

from collections.abc import Iterator, Sequence

from pg_exports.interval import Interval
from pg_exports.postgres import schemas
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = "pg_exports_rejected"

BATCH_ROWS, BATCH_BYTES = 1_000, 16 * 1024 * 1024
"""What one statement takes: rows, and bytes of rows unless a single one has more."""

_CREATE = """
CREATE TABLE IF NOT EXISTS {rejected} (
    destination text NOT NULL,
    export text NOT NULL,
    interval_start timestamptz NOT NULL,
    interval_end timestamptz NOT NULL,
    row_hash text NOT NULL,
    key json NOT NULL,
    column_name text,
    reason text NOT NULL,
    row_as_it_was text NOT NULL,
    run_id text NOT NULL,
    rejected_at timestamptz NOT NULL,
    resolved_at timestamptz,
    PRIMARY KEY (destination, export, interval_start, interval_end, row_hash)
)
"""

_RESOLVE = """
UPDATE {rejected} SET resolved_at = clock_timestamp()
WHERE destination = $1 AND export = $2 AND resolved_at IS NULL AND run_id <> $5 AND (interval_start, interval_end) IN (
    SELECT * FROM unnest($3::text[]::timestamptz[], $4::text[]::timestamptz[])
)
"""

_KEEP = """
INSERT INTO {rejected} (
    destination, export, interval_start, interval_end, row_hash, key, column_name, reason, row_as_it_was, run_id, rejected_at
)
SELECT $1, $2, $3::text::timestamptz, $4::text::timestamptz, md5(bad.row), bad.key::json, bad.column_name, bad.reason,
    bad.row, $5, clock_timestamp()
FROM unnest($6::text[], $7::text[], $8::text[], $9::text[]) AS bad(row, key, column_name, reason)
ON CONFLICT (destination, export, interval_start, interval_end, row_hash) DO UPDATE SET
    column_name = excluded.column_name,
    reason = excluded.reason,
    run_id = excluded.run_id,
    rejected_at = excluded.rejected_at,
    resolved_at = NULL
"""


def ensure(session: Session, schema: str) -> None:
    """Create the table where it is missing. Raises as `schemas.ensure_own`."""
    schemas.ensure_own(session, schema, TABLE, _CREATE.format(rejected=quoted(schema, TABLE)))


def resolve(session: Session, table: DestinationTable, export: str, intervals: Sequence[Interval], run_id: str) -> None:
    """Take the intervals' rejected rows for resolved that this run, which has written the intervals, did not set aside."""
    session.execute(
        _RESOLVE.format(rejected=quoted(table.destination.schema, TABLE)),
        table.destination.table,
        export,
        [interval.start.isoformat() for interval in intervals],
        [interval.end.isoformat() for interval in intervals],
        run_id,
        doing="resolving rejected rows",
    )


def keep(
    session: Session, table: DestinationTable, export: str, interval: Interval, run_id: str, rows: Sequence[BadRow]
) -> None:
    """Set rows aside. The same row of the same interval is kept once."""
    for batch in _batches(rows):
        session.execute(
            _KEEP.format(rejected=quoted(table.destination.schema, TABLE)),
            table.destination.table,
            export,
            interval.start,
            interval.end,
            run_id,
            [bad.row for bad in batch],
            [bad.key for bad in batch],
            [bad.column for bad in batch],
            [bad.reason for bad in batch],
            doing="setting rejected rows aside",
        )


def _batches(rows: Sequence[BadRow]) -> Iterator[list[BadRow]]:
    """Different rows, as many together as one statement takes: it may not meet a row that it has just written."""
    batch: list[BadRow] = []
    size = 0
    for bad in {bad.row: bad for bad in rows}.values():
        if batch and (len(batch) == BATCH_ROWS or size + len(bad.row) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(bad)
        size += len(bad.row)
    if batch:
        yield batch
