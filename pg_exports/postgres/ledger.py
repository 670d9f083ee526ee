"""The ledger: which interval of which export was committed to a table, by which run, with which counts.

It lies in the destination's schema, is written in the transaction that writes the rows, and is read first by every
later run. With the key journals beside it, it tells what a table has of an interval already.
"""

import json
from dataclasses import dataclass
from datetime import datetime

from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Counts, Interval
from pg_exports.models.model import moment
from pg_exports.postgres import journal
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import LOCK_TIMEOUT, Session
from pg_exports.postgres.table import Destination, DestinationTable, ensure_own

TABLE = "pg_exports_ledger"

UNKNOWN = -1
"""Stands for the number of an interval's keys in the journals where not all of them are there."""

_CREATE = """
CREATE TABLE IF NOT EXISTS {ledger} (
    destination text NOT NULL,
    table_oid bigint NOT NULL,
    table_filenode bigint NOT NULL,
    partition_filenodes bigint[] NOT NULL,
    team_id bigint NOT NULL,
    interval_start timestamptz NOT NULL,
    interval_end timestamptz NOT NULL,
    export text NOT NULL,
    fingerprint text,
    rows_before boolean NOT NULL,
    rows_at_source bigint NOT NULL,
    rows_inserted bigint NOT NULL,
    rows_updated bigint NOT NULL,
    rows_unchanged bigint NOT NULL,
    rows_repaired bigint NOT NULL,
    rows_rejected bigint NOT NULL,
    rows_missing bigint NOT NULL,
    keys bigint NOT NULL,
    bytes bigint NOT NULL,
    run_id text NOT NULL,
    started_at timestamptz NOT NULL,
    committed_at timestamptz NOT NULL,
    PRIMARY KEY (destination, table_oid, table_filenode, team_id, interval_start, interval_end, export)
)
"""

_RECORD = """
INSERT INTO {ledger} (
    destination, table_oid, table_filenode, team_id, interval_start, interval_end, export, partition_filenodes,
    fingerprint, rows_before, rows_at_source, rows_inserted, rows_updated, rows_unchanged, rows_repaired, rows_rejected,
    rows_missing, keys, bytes, run_id, started_at, committed_at
)
VALUES (
    $1, $2, $3, $4, $5::text::timestamptz, $6::text::timestamptz, $7, $8::text::bigint[], $9, $10, $11, $12, $13, $14,
    $15, $16, $17, $18, $19, $20, $21::text::timestamptz, clock_timestamp()
)
ON CONFLICT (destination, table_oid, table_filenode, team_id, interval_start, interval_end, export) DO UPDATE SET
    partition_filenodes = excluded.partition_filenodes,
    fingerprint = excluded.fingerprint,
    rows_before = excluded.rows_before,
    rows_at_source = excluded.rows_at_source,
    rows_inserted = excluded.rows_inserted,
    rows_updated = excluded.rows_updated,
    rows_unchanged = excluded.rows_unchanged,
    rows_repaired = excluded.rows_repaired,
    rows_rejected = excluded.rows_rejected,
    rows_missing = excluded.rows_missing,
    keys = excluded.keys,
    bytes = excluded.bytes,
    run_id = excluded.run_id,
    started_at = excluded.started_at,
    committed_at = excluded.committed_at
"""

# One statement, one snapshot: were the ledger read first and the table later, the rows that another run commits in
# between would pass for rows that were there before.
# Of an interval that several exports wrote, each one's journal must be whole.
_PAST = f"""
WITH
    overlapping AS (
        SELECT * FROM {{ledger}} WHERE {journal.OVERLAPPING}
    ),
    journaled AS (
        SELECT interval_start, interval_end, export, sum(octet_length(keys)) / 8 AS keys
        FROM {{journal}} WHERE {journal.OVERLAPPING}
        GROUP BY interval_start, interval_end, export
    ),
    same AS (
        SELECT * FROM overlapping
        WHERE interval_start = $5::text::timestamptz AND interval_end = $6::text::timestamptz
    )
SELECT
    (
        SELECT rows_before FROM {{ledger}}
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3
        LIMIT 1
    ),
    EXISTS (SELECT FROM {{table}}),
    EXISTS (SELECT FROM overlapping),
    (
        SELECT count(*) FROM overlapping
        LEFT JOIN journaled USING (interval_start, interval_end, export)
        WHERE overlapping.keys <> coalesce(journaled.keys, 0) OR NOT partition_filenodes <@ $7::text::bigint[]
    ) = 0,
    coalesce(
        (
            SELECT keys::bigint FROM journaled
            WHERE interval_start = $5::text::timestamptz AND interval_end = $6::text::timestamptz AND export = $8
        ),
        0
    ),
    (
        SELECT string_agg(fingerprint, ' ') FROM same
        WHERE rows_rejected = 0 AND rows_missing = 0 AND partition_filenodes <@ $7::text::bigint[]
    ),
    (SELECT row_to_json(same)::text FROM same WHERE export = $8 AND run_id = $9)
"""

_FINGERPRINTS = """
SELECT
    (extract(epoch FROM interval_start) * 1000000)::bigint,
    (extract(epoch FROM interval_end) * 1000000)::bigint,
    fingerprint
FROM {ledger}
WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = $4 AND export = $5
    AND interval_start >= $6::text::timestamptz AND interval_end <= $7::text::timestamptz
"""


@dataclass(frozen=True)
class Past:
    """What a table has of an interval's rows, and how that is known.

    Attributes:
        rows_before: the table had rows before pg_exports first wrote to it (as it is now: a table that was truncated or
            made anew is another one).
        has_interval: intervals that overlap this one were committed to it.
        is_journaled: the journals hold the keys of all of their rows, and the partitions that these went into are there.
        keys: keys in the export's own journals of this very interval.
        fingerprints: of the interval's rows at the source, whenever all of them landed.
        by_this_run: the counts, where this run itself has committed the interval (in an earlier try).
    """

    rows_before: bool
    has_interval: bool
    is_journaled: bool
    keys: int
    fingerprints: frozenset[str]
    by_this_run: Counts | None


def ensure(session: Session, schema: str) -> None:
    """Create the ledger and the journals where they are missing. Raises as `table.ensure_own`."""
    ensure_own(session, schema, TABLE, _CREATE.format(ledger=quoted(schema, TABLE)))
    journal.ensure(session, schema)


def lock(session: Session, destination: Destination, interval: Interval, *, whole_table: bool = False) -> None:
    """Wait for every run that writes to the table in an hour that the interval touches, and keep others waiting.

    Hours, in ascending order, so that intervals of different lengths meet without a deadlock. Until the transaction ends.
    With `whole_table` also for every other run that asks for it.
    """
    if whole_table:
        session.execute(
            "SELECT pg_advisory_xact_lock(hashtext($1))",
            f"pg_exports: {destination.qualified}",
            doing=f"waiting for another run into {destination.qualified}",
            patience=LOCK_TIMEOUT,
        )
    first = int(interval.start.timestamp()) // 3600
    last = (int(interval.end.timestamp()) - 1) // 3600
    session.execute(
        "SELECT count(pg_advisory_xact_lock(hashtext($1), hour::int)) FROM generate_series($2::bigint, $3::bigint) AS hour",
        f"pg_exports: {destination.qualified}",
        first,
        last,
        doing=f"waiting for another run of {interval}",
        patience=LOCK_TIMEOUT,
    )


def past(
    session: Session, table: DestinationTable, interval: Interval, *, export: str, team_id: int, run_id: str
) -> Past:
    """What the table has of the team's rows of the interval. To be asked under `lock`, in a statement of its own."""
    schema = table.destination.schema
    sql = _PAST.format(ledger=quoted(schema, TABLE), journal=quoted(schema, journal.TABLE), table=table.qualified)
    [row] = session.rows(
        sql,
        *table.identity,
        team_id,
        interval.start,
        interval.end,
        _array(table.partition_filenodes),
        export,
        run_id,
        doing="reading the ledger",
    )
    rows_before, has_rows, has_interval, is_journaled, keys, fingerprints, by_this_run = row
    return Past(
        rows_before=bool(has_rows) if rows_before is None else bool(rows_before),
        has_interval=bool(has_interval),
        is_journaled=bool(is_journaled),
        keys=int(str(keys)),
        fingerprints=frozenset(str(fingerprints or "").split()),
        by_this_run=_counts(str(by_this_run)) if by_this_run else None,
    )


def exists(session: Session, schema: str) -> bool:
    """Whether the schema has a ledger."""
    [(found,)] = session.rows(
        "SELECT to_regclass($1) IS NOT NULL", quoted(schema, TABLE), doing="looking up the ledger"
    )
    return bool(found)


def fingerprints(
    session: Session, table: DestinationTable, export: str, team_id: int, span: Interval
) -> dict[tuple[datetime, datetime], str]:
    """The fingerprints of an export's intervals within a span that were committed to the table, by their bounds."""
    rows = session.rows(
        _FINGERPRINTS.format(ledger=quoted(table.destination.schema, TABLE)),
        *table.identity,
        team_id,
        export,
        span.start,
        span.end,
        doing="reading the ledger",
    )
    return {
        (moment(int(str(start))), moment(int(str(end)))): str(fingerprint)
        for start, end, fingerprint in rows
        if fingerprint
    }


def record(
    session: Session,
    table: DestinationTable,
    interval: Interval,
    counts: Counts,
    *,
    export: str,
    team_id: int,
    fingerprint: Fingerprint | None,
    keys: int,
    rows_before: bool,
    run_id: str,
    started_at: datetime,
) -> None:
    """Write the interval's row. A later run of the same interval replaces it, but not that of another team or of a table
    that has gone: it may come back by RENAME, with its rows.
    """
    session.execute(
        _RECORD.format(ledger=quoted(table.destination.schema, TABLE)),
        *table.identity,
        team_id,
        interval.start,
        interval.end,
        export,
        _array(table.partition_filenodes),
        str(fingerprint) if fingerprint else None,
        rows_before,
        counts.at_source,
        counts.inserted,
        counts.updated,
        counts.unchanged,
        counts.repaired,
        counts.rejected,
        counts.missing,
        keys,
        counts.bytes,
        run_id,
        started_at,
        doing="writing the ledger",
    )


def _counts(row: str) -> Counts:
    values = json.loads(row)
    return Counts(
        at_source=values["rows_at_source"],
        inserted=values["rows_inserted"],
        updated=values["rows_updated"],
        unchanged=values["rows_unchanged"],
        repaired=values["rows_repaired"],
        rejected=values["rows_rejected"],
        missing=values["rows_missing"],
        bytes=values["bytes"],
    )


def _array(numbers: tuple[int, ...]) -> str:
    """A bigint[] as text: the driver binds an empty list without a type."""
    return "{" + ",".join(map(str, numbers)) + "}"
