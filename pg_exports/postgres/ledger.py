"""The ledger: which interval of which export was committed to a table, by which run, with which counts.

It lies in the destination's schema, is written in the transaction that writes the rows, and is read first by every
later run. It also tells whether a table can have rows of an interval already.
"""

from dataclasses import dataclass
from datetime import datetime

from pg_exports.errors import DestinationError
from pg_exports.interval import Interval
from pg_exports.postgres import table as tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = "pg_exports_ledger"

NO_FILE = 0
"""Stands for the filenode of a partitioned table, which has none."""

_CREATE = """
CREATE TABLE IF NOT EXISTS {ledger} (
    destination text NOT NULL,
    export text NOT NULL,
    interval_start timestamptz NOT NULL,
    interval_end timestamptz NOT NULL,
    team_id bigint NOT NULL,
    table_oid bigint NOT NULL,
    table_filenode bigint NOT NULL,
    rows_before boolean NOT NULL,
    rows_at_source bigint NOT NULL,
    rows_inserted bigint NOT NULL,
    rows_updated bigint NOT NULL,
    rows_unchanged bigint NOT NULL,
    rows_repaired bigint NOT NULL,
    rows_rejected bigint NOT NULL,
    bytes bigint NOT NULL,
    run_id text NOT NULL,
    started_at timestamptz NOT NULL,
    committed_at timestamptz NOT NULL,
    PRIMARY KEY (destination, export, team_id, interval_start, interval_end, table_oid, table_filenode)
)
"""

_RECORD = """
INSERT INTO {ledger} (
    destination, export, interval_start, interval_end, team_id, table_oid, table_filenode, rows_before,
    rows_at_source, rows_inserted, rows_updated, rows_unchanged, rows_repaired, rows_rejected, bytes, run_id, started_at,
    committed_at
)
VALUES (
    $1, $2, $3::text::timestamptz, $4::text::timestamptz, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,
    $17::text::timestamptz, clock_timestamp()
)
ON CONFLICT (destination, export, team_id, interval_start, interval_end, table_oid, table_filenode) DO UPDATE SET
    rows_before = excluded.rows_before,
    rows_at_source = excluded.rows_at_source,
    rows_inserted = excluded.rows_inserted,
    rows_updated = excluded.rows_updated,
    rows_unchanged = excluded.rows_unchanged,
    rows_repaired = excluded.rows_repaired,
    rows_rejected = excluded.rows_rejected,
    bytes = excluded.bytes,
    run_id = excluded.run_id,
    started_at = excluded.started_at,
    committed_at = excluded.committed_at
"""

# One statement, one snapshot: were the ledger read first and the table later, the rows that another run commits in
# between would pass for rows that were there before.
_PAST = """
SELECT
    (
        SELECT bool_or(rows_before)
        FROM {ledger}
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
    ),
    EXISTS (
        SELECT FROM {ledger}
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
            AND team_id = $4 AND interval_start < $6::text::timestamptz AND interval_end > $5::text::timestamptz
    ),
    EXISTS (SELECT FROM {table})
"""


@dataclass(frozen=True)
class Counts:
    """What became of an interval's rows, and their size as Arrow in bytes."""

    at_source: int
    inserted: int
    updated: int
    unchanged: int
    repaired: int
    rejected: int
    bytes: int


@dataclass(frozen=True)
class Past:
    """What a table may hold already.

    Attributes:
        rows_before: it had rows before pg_exports first wrote to it (as it is now: a table that was truncated or made
            anew is another one).
        may_hold_interval: rows of the interval may be there.
    """

    rows_before: bool
    may_hold_interval: bool


def ensure(session: Session, schema: str) -> None:
    """Create the ledger where it is missing. Raises as `ensure_own`."""
    ensure_own(session, schema, TABLE, _CREATE.format(ledger=quoted(schema, TABLE)))


def ensure_own(session: Session, schema: str, name: str, create: str) -> None:
    """Create one of pg_exports' own tables where it is missing.

    Raises:
        DestinationError: the role may not create it, or not write the one that another role made; with the GRANT.
    """
    rows = session.rows(
        """
        SELECT current_user::text, has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'SELECT')
            AND has_table_privilege(c.oid, 'UPDATE')
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        schema,
        name,
        doing=f"looking up {name}",
    )
    table = quoted(schema, name)
    if not rows:
        tables.check_may_create(session, schema, f"the table {table}")
        tables.create_if_missing(session, create, f"creating {table}")
    elif not rows[0][1]:
        raise DestinationError(
            f"The role {rows[0][0]} may not write {table}, which another role made. Run as its owner: "
            f"GRANT INSERT, SELECT, UPDATE ON {table} TO {quoted(str(rows[0][0]))};"
        )


def lock(session: Session, table: DestinationTable, interval: Interval, *, whole_table: bool = False) -> None:
    """Wait for every run that writes to the table in an hour that the interval touches, and keep others waiting.

    Hours, in ascending order, so that intervals of different lengths meet without a deadlock. Until the transaction ends.
    With `whole_table` also for every other run that asks for it.
    """
    if whole_table:
        session.execute(
            "SELECT pg_advisory_xact_lock(hashtext($1))",
            f"pg_exports: {table.qualified}",
            doing=f"waiting for another run into {table.qualified}",
        )
    first = int(interval.start.timestamp()) // 3600
    last = (int(interval.end.timestamp()) - 1) // 3600
    session.execute(
        "SELECT count(pg_advisory_xact_lock(hashtext($1), hour::int)) FROM generate_series($2::bigint, $3::bigint) AS hour",
        f"pg_exports: {table.qualified}",
        first,
        last,
        doing=f"waiting for another run of {interval}",
    )


def past(session: Session, table: DestinationTable, team_id: int, interval: Interval) -> Past:
    """What the table may hold of the team's rows of the interval. To be asked under `lock`, in a statement of its own."""
    sql = _PAST.format(ledger=quoted(table.destination.schema, TABLE), table=table.qualified)
    [(known, overlaps, has_rows)] = session.rows(
        sql,
        table.destination.table,
        table.oid,
        table.filenode or NO_FILE,
        team_id,
        interval.start,
        interval.end,
        doing="reading the ledger",
    )
    rows_before = bool(has_rows) if known is None else bool(known)
    return Past(rows_before, may_hold_interval=rows_before or bool(overlaps))


def record(
    session: Session,
    table: DestinationTable,
    interval: Interval,
    counts: Counts,
    *,
    export: str,
    team_id: int,
    rows_before: bool,
    run_id: str,
    started_at: datetime,
) -> None:
    """Write the interval's row. A later run of the same interval replaces it, but not that of another team or of a table
    that has gone: it may come back by RENAME, with its rows.
    """
    session.execute(
        _RECORD.format(ledger=quoted(table.destination.schema, TABLE)),
        table.destination.table,
        export,
        interval.start,
        interval.end,
        team_id,
        table.oid,
        table.filenode or NO_FILE,
        rows_before,
        counts.at_source,
        counts.inserted,
        counts.updated,
        counts.unchanged,
        counts.repaired,
        counts.rejected,
        counts.bytes,
        run_id,
        started_at,
        doing="writing the ledger",
    )
