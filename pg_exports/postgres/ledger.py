"""The ledger: which interval of which export was committed to a table, by which run, with which counts.

It lies in the destination's schema, is written in the transaction that writes the rows, and is read first by every
later run. With the key journals beside it, it tells what a table has of an interval already.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pg_exports.fingerprint import Fingerprint, scheme_of
from pg_exports.interval import Counts, Interval
from pg_exports.models.model import OF_STATES, Model, moment
from pg_exports.postgres import journal, own_tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = own_tables.LEDGER

UNKNOWN = -1
"""Stands for the number of an interval's keys in the journals where not all of them are there."""

_CREATE = """
CREATE TABLE {ledger} (
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
    destination, table_oid, table_filenode, partition_filenodes, team_id, export, rows_before, run_id, started_at,
    committed_at, interval_start, interval_end, fingerprint, rows_at_source, rows_inserted, rows_updated, rows_unchanged,
    rows_repaired, rows_rejected, rows_missing, keys, bytes
)
SELECT $1, $2, $3, $4::text::bigint[], $5, $6, $7, $8, $9::text::timestamptz, clock_timestamp(), written.*
FROM json_to_recordset($10::text::json) AS written(
    interval_start timestamptz, interval_end timestamptz, fingerprint text, at_source bigint, inserted bigint,
    updated bigint, unchanged bigint, repaired bigint, rejected bigint, missing bigint, keys bigint, bytes bigint
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

# Of an interval that several exports wrote, each one's journal must be whole.
_PAST = f"""
WITH
    asked AS (
        SELECT *
        FROM unnest($5::text[]::timestamptz[], $6::text[]::timestamptz[]) WITH ORDINALITY AS a(first, last, number)
    ),
    overlapping AS MATERIALIZED (
        SELECT asked.*, ledger.*
        FROM asked
        JOIN {{ledger}} AS ledger ON {journal.OVERLAPPING}
    ),
    journaled AS MATERIALIZED (
        SELECT number, interval_start, interval_end, export, sum(octet_length(keys)) / 8 AS keys
        FROM asked
        JOIN {{journal}} AS journal ON {journal.OVERLAPPING}
        GROUP BY number, interval_start, interval_end, export
    ),
    found AS (
        SELECT
            number,
            bool_and(
                overlapping.keys = coalesce(journaled.keys, 0) AND partition_filenodes <@ $7::text::bigint[]
                    AND split_part(fingerprint, ':', 4) IS NOT DISTINCT FROM $10
            ) AS is_journaled,
            sum(journaled.keys) FILTER (
                WHERE interval_start = first AND interval_end = last AND export = $8
            ) AS keys,
            string_agg(fingerprint, ' ') FILTER (
                WHERE interval_start = first AND interval_end = last AND rows_rejected = 0 AND rows_missing = 0
                    AND partition_filenodes <@ $7::text::bigint[]
            ) AS fingerprints,
            min(fingerprint) FILTER (
                WHERE interval_start = first AND interval_end = last AND export = $8 AND rows_missing = 0
            ) AS own_fingerprint,
            coalesce(bool_or(starts_with(split_part(fingerprint, ':', 4), $11)), false) AS was_merged,
            min(
                json_build_object(
                    'at_source', rows_at_source, 'inserted', rows_inserted, 'updated', rows_updated,
                    'unchanged', rows_unchanged, 'repaired', rows_repaired, 'rejected', rows_rejected,
                    'missing', rows_missing, 'bytes', bytes
                )::text
            ) FILTER (
                WHERE interval_start = first AND interval_end = last AND export = $8 AND run_id = $9
            ) AS by_this_run
        FROM overlapping
        LEFT JOIN journaled USING (number, interval_start, interval_end, export)
        GROUP BY number
    )
SELECT
    found.number IS NOT NULL OR EXISTS (SELECT FROM journaled WHERE journaled.number = asked.number),
    coalesce(found.is_journaled, true),
    coalesce(found.keys, 0)::bigint,
    coalesce(found.fingerprints, ''),
    found.own_fingerprint,
    coalesce(found.was_merged, false),
    found.by_this_run
FROM asked
LEFT JOIN found USING (number)
ORDER BY number
"""

_ENTRIES = """
SELECT
    (extract(epoch FROM interval_start) * 1000000)::bigint,
    (extract(epoch FROM interval_end) * 1000000)::bigint,
    export,
    fingerprint,
    rows_at_source,
    rows_missing,
    rows_rejected,
    run_id
FROM {ledger}
WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = ANY($4::text::bigint[])
    AND interval_start >= $5::text::timestamptz AND interval_start < $6::text::timestamptz
    AND interval_end <= $6::text::timestamptz
"""

_GAPS = """
SELECT (extract(epoch FROM covered) * 1000000)::bigint, (extract(epoch FROM interval_start) * 1000000)::bigint
FROM (
    SELECT
        interval_start,
        max(interval_end) OVER (ORDER BY interval_start ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS covered
    FROM {ledger}
    WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = $4 AND export = $5
        AND interval_start >= $6::text::timestamptz AND rows_missing = 0
) AS intervals
WHERE interval_start > covered
ORDER BY interval_start
"""


@dataclass(frozen=True)
class Past:
    """What a table has of an interval's rows, and how that is known.

    Attributes:
        has_interval: intervals that overlap this one were committed to it.
        is_journaled: the journals hold the keys of all of their rows, made as the model makes them now, and the partitions
            that these went into are there.
        keys: keys in the export's own journals of this very interval.
        fingerprints: of the interval's rows at the source, whenever all of them landed.
        own_fingerprint: of the rows that this export met when it wrote this very interval, those that were rejected too.
        was_merged: some of the intervals that overlap it were merged.
        by_this_run: the counts, where this run itself has committed the interval (in an earlier try).
    """

    has_interval: bool
    is_journaled: bool
    keys: int
    fingerprints: frozenset[str]
    own_fingerprint: str | None
    was_merged: bool
    by_this_run: Counts | None

    def has_keys_of_another_scheme(self, model: Model) -> bool:
        """Whether the export's own journals have hashes that are made of something else than the model's."""
        own = self.own_fingerprint
        return own is not None and self.keys > 0 and scheme_of(own).split(":")[0] != model.journal_scheme


@dataclass(frozen=True)
class Written:
    """An interval's counts, and what the ledger keeps beside them.

    Attributes:
        fingerprint: of the interval's rows at the source; None where they have no identity.
        keys: keys in the export's journals of the interval, or `UNKNOWN`.
    """

    counts: Counts
    fingerprint: Fingerprint | None
    keys: int


def ensure(session: Session, schema: str) -> None:
    """Create the ledger and the journals where they are missing. Raises as `own_tables.ensure`."""
    own_tables.ensure(session, schema, TABLE, _CREATE.format(ledger=quoted(schema, TABLE)))
    journal.ensure(session, schema)


def past(
    session: Session,
    table: DestinationTable,
    intervals: Sequence[Interval],
    *,
    export: str,
    team_id: int,
    run_id: str,
) -> list[Past]:
    """What the table has of the team's rows of each interval. To be asked under `locks.lock`, in a statement of its own."""
    schema = table.destination.schema
    sql = _PAST.format(ledger=quoted(schema, TABLE), journal=quoted(schema, journal.TABLE))
    rows = session.rows(
        sql,
        *table.identity,
        table.teams(team_id),
        [interval.start.isoformat() for interval in intervals],
        [interval.end.isoformat() for interval in intervals],
        _array(table.partition_filenodes),
        export,
        run_id,
        table.model.journal_scheme,
        OF_STATES,
        doing="reading the ledger",
    )
    return [
        Past(
            has_interval=bool(has_interval),
            is_journaled=bool(is_journaled),
            keys=int(str(keys)),
            fingerprints=frozenset(str(fingerprints).split()),
            own_fingerprint=str(own_fingerprint) if own_fingerprint else None,
            was_merged=bool(was_merged),
            by_this_run=Counts(**json.loads(str(by_this_run))) if by_this_run else None,
        )
        for has_interval, is_journaled, keys, fingerprints, own_fingerprint, was_merged, by_this_run in rows
    ]


def exists(session: Session, schema: str) -> bool:
    """Whether the schema has a ledger. Raises as `own_tables.there`."""
    return TABLE in own_tables.there(session, schema)


Bounds = tuple[datetime, datetime]
"""Start and end of an interval."""


@dataclass(frozen=True)
class Entry:
    """What the ledger has of an interval of an export.

    Attributes:
        bounds: start and end.
        export: its name.
        fingerprint: of the rows that the run met; empty if an earlier version wrote it without one.
        rows: how many rows these were.
        missing: how many of them are not in the table.
        rejected: how many were set aside.
        run_id: of the run.
    """

    bounds: Bounds
    export: str
    fingerprint: str
    rows: int
    missing: int
    rejected: int
    run_id: str


def entries(session: Session, table: DestinationTable, team_id: int, span: Interval) -> list[Entry]:
    """The intervals within a span that were committed to the table for a team, by whatever export."""
    rows = session.rows(
        _ENTRIES.format(ledger=quoted(table.destination.schema, TABLE)),
        *table.identity,
        table.teams(team_id),
        span.start,
        span.end,
        doing="reading the ledger",
    )
    return [
        Entry(
            (moment(int(str(start))), moment(int(str(end)))),
            str(export),
            str(fingerprint or ""),
            int(str(at_source)),
            int(str(missing)),
            int(str(rejected)),
            str(run_id),
        )
        for start, end, export, fingerprint, at_source, missing, rejected, run_id in rows
    ]


def of_export(entries: Iterable[Entry], export: str, exports: Collection[str]) -> dict[Bounds, Entry]:
    """An export's intervals, by their bounds.

    Args:
        entries: as `entries` gives them.
        export: its name.
        exports: the names of all exports of the deployment. An entry of any other is taken for one of this export under an
            earlier name, unless it has one of its own.
    """
    mine: dict[Bounds, Entry] = {}
    for entry in entries:
        if entry.export == export or (entry.export not in exports and entry.bounds not in mine):
            mine[entry.bounds] = entry
    return mine


def history(session: Session, table: DestinationTable, export: str, team_id: int, span: Interval) -> dict[Bounds, int]:
    """Rows at the source of an export's intervals within a span that were committed to the table."""
    return {entry.bounds: entry.rows for entry in entries(session, table, team_id, span) if entry.export == export}


def gaps(session: Session, table: DestinationTable, export: str, team_id: int, since: datetime) -> list[Bounds]:
    """Bounds of the time between two of an export's intervals that none of its intervals covers, oldest first."""
    rows = session.rows(
        _GAPS.format(ledger=quoted(table.destination.schema, TABLE)),
        *table.identity,
        team_id,
        export,
        since,
        doing="reading the ledger",
    )
    return [(moment(int(str(start))), moment(int(str(end)))) for start, end in rows]


def record(
    session: Session,
    table: DestinationTable,
    written: Mapping[Interval, Written],
    *,
    export: str,
    team_id: int,
    run_id: str,
    started_at: datetime,
) -> None:
    """Write the intervals' rows. A later run of an interval replaces its row, but not that of another team or of a table
    that has gone: it may come back by RENAME, with its rows.
    """
    rows = [
        {
            "interval_start": interval.start.isoformat(),
            "interval_end": interval.end.isoformat(),
            "fingerprint": str(what.fingerprint) if what.fingerprint else None,
            "keys": what.keys,
            **vars(what.counts),
        }
        for interval, what in written.items()
    ]
    session.execute(
        _RECORD.format(ledger=quoted(table.destination.schema, TABLE)),
        *table.identity,
        _array(table.partition_filenodes),
        team_id,
        export,
        table.rows_before,
        run_id,
        started_at,
        json.dumps(rows),
        doing="writing the ledger",
    )


def _array(numbers: tuple[int, ...]) -> str:
    """A bigint[] as text: the driver binds an empty list without a type."""
    return "{" + ",".join(map(str, numbers)) + "}"
