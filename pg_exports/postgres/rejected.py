"""Rejected rows: a table beside the destination keeps them with the reason, so that no row is dropped silently.

It is written in the interval's transaction. An entry gets a `resolved_at` when a later run of the interval, for the same
team, reads its row and does not reject it. Keys are JSON and not JSONB, which has no NUL: it may be what is wrong with them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import md5
from typing import TypeVar

import polars as pl

from pg_exports.interval import Interval
from pg_exports.models import IDENTITY, INTERVAL, STATE
from pg_exports.postgres import bad_rows, ledger, own_tables
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.journal import NOTHING, among
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = own_tables.REJECTED

BATCH_ROWS, BATCH_BYTES = 1_000, 16 * 1024 * 1024
"""What one statement takes: rows, and bytes of rows unless a single one has more."""

MOST_UNRESOLVED = 100_000
"""Entries that one run looks for, about 10 MB. If there are more, the others wait for the next run."""

_CREATE = """
CREATE TABLE {rejected} (
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

# Also the entries of other exports that wrote the interval for the same team: one may be this one under an earlier name.
_UNRESOLVED = """
WITH
    asked AS (
        SELECT *
        FROM unnest($6::text[]::timestamptz[], $7::text[]::timestamptz[]) WITH ORDINALITY AS asked(first, last, number)
    ),
    written AS (
        SELECT number, first, last, $5::text AS by_export FROM asked
        UNION
        SELECT number, first, last, export
        FROM asked
        JOIN {ledger} ON interval_start = first AND interval_end = last
        WHERE destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = ANY($4::text::bigint[])
    )
SELECT DISTINCT number, by_export, md5(key::text)
FROM written
JOIN {rejected} ON export = by_export AND interval_start = first AND interval_end = last
WHERE destination = $1 AND resolved_at IS NULL
LIMIT $8
"""

_UNRESOLVED_COUNTS = """
SELECT number, count(DISTINCT md5(key::text))
FROM {rejected}
JOIN unnest($2::text[], $3::text[]::timestamptz[], $4::text[]::timestamptz[])
    WITH ORDINALITY AS asked(by_export, first, last, number)
    ON export = by_export AND interval_start = first AND interval_end = last
WHERE destination = $1 AND resolved_at IS NULL
GROUP BY number
"""

_RESOLVE = """
UPDATE {rejected} SET resolved_at = clock_timestamp()
WHERE destination = $1 AND export = ANY($2::text[])
    AND interval_start = $3::text::timestamptz AND interval_end = $4::text::timestamptz
    AND resolved_at IS NULL AND md5(key::text) = ANY ($5::text[])
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
    """Create the table where it is missing. Raises as `own_tables.ensure`."""
    own_tables.ensure(session, schema, TABLE, _CREATE.format(rejected=quoted(schema, TABLE)))


class Unresolved:
    """The unresolved entries of some intervals: which of them a run has met again, and which it has rejected again.

    An entry and a row belong together if they have the same key, and an export of the same team made the entry. Without
    entries nothing is done to any row.
    """

    def __init__(
        self, session: Session, table: DestinationTable, export: str, team_id: int, intervals: Sequence[Interval]
    ) -> None:
        """Reads the entries. Raises as a session's statements do."""
        self._session = session
        self._table = table.destination.table
        self._rejected_table = quoted(table.destination.schema, TABLE)
        self._model = table.model
        entries = session.rows(
            _UNRESOLVED.format(rejected=self._rejected_table, ledger=quoted(table.destination.schema, ledger.TABLE)),
            *table.identity,
            table.teams(team_id),
            export,
            [interval.start.isoformat() for interval in intervals],
            [interval.end.isoformat() for interval in intervals],
            MOST_UNRESOLVED,
            doing="reading the rejected rows of earlier runs",
        )
        self._entries: dict[Interval, set[str]] = {}
        for number, _, key in entries:
            self._entries.setdefault(intervals[int(str(number)) - 1], set()).add(str(key))
        self._exports = sorted({str(by_export) for _, by_export, _ in entries})
        self._by_position = {interval.position: interval for interval in self._entries}
        self._met: dict[Interval, set[str]] = {interval: set() for interval in self._entries}
        self._rejected: dict[Interval, set[str]] = {interval: set() for interval in self._entries}
        self.states: list[int] = []
        """The states of the rows that were met."""
        self.has_known = False
        """Whether a row of an entry was among the known ones."""

    @property
    def intervals(self) -> Collection[Interval]:
        """The intervals that have any."""
        return self._entries.keys()

    def watch(self, frames: Iterable[pl.DataFrame], known: pl.Series = NOTHING.keys) -> Iterator[pl.DataFrame]:
        """The frames as they are, with a note of the entries whose rows they hold.

        Args:
            frames: rows with their keys, and the columns beside them.
            known: identities (ascending) of rows that are in the table and are not compared with it now: the source may have
                them in another state, which is the one that was rejected. Their entries do not count as met.
        """
        if not self._entries:
            yield from frames
            return
        for frame in frames:
            keys = bad_rows.keys(frame, self._model)
            columns = frame[INTERVAL], keys, frame[STATE], among(frame[IDENTITY], known)
            for position, key, state, is_known in zip(*columns, strict=True):
                interval = self._by_position.get(position)
                if interval is None or not self._is_entry(interval, key):
                    continue
                if is_known:
                    self.has_known = True
                else:
                    self._met[interval].add(_hashed(key))
                    self.states.append(state)
            yield frame

    def reject(self, interval: Interval, rows: Iterable[BadRow]) -> None:
        """Rows that were rejected now."""
        for row in rows:
            if self._is_entry(interval, row.key):
                self._rejected[interval].add(_hashed(row.key))

    def resolve(self, intervals: Iterable[Interval]) -> None:
        """Resolve the entries of these intervals whose row was met and not rejected. All their other rows have landed."""
        for interval in intervals:
            landed = sorted(self._met.get(interval, set()) - self._rejected.get(interval, set()))
            for keys in _batches(landed, size=len):
                self._session.execute(
                    _RESOLVE.format(rejected=self._rejected_table),
                    self._table,
                    self._exports,
                    interval.start,
                    interval.end,
                    keys,
                    doing="resolving rejected rows",
                )

    def _is_entry(self, interval: Interval, key: str) -> bool:
        return _hashed(key) in self._entries.get(interval, ())


def _hashed(key: str) -> str:
    return md5(key.encode(), usedforsecurity=False).hexdigest()


def unresolved(session: Session, table: DestinationTable, exports: Mapping[Interval, str]) -> dict[Interval, int]:
    """How many rows of each interval the export that wrote it has set aside that were not resolved; none if the schema has
    no such table.
    """
    if TABLE not in own_tables.there(session, table.destination.schema):
        return {}
    rows = session.rows(
        _UNRESOLVED_COUNTS.format(rejected=quoted(table.destination.schema, TABLE)),
        table.destination.table,
        list(exports.values()),
        [interval.start.isoformat() for interval in exports],
        [interval.end.isoformat() for interval in exports],
        doing="counting rejected rows",
    )
    intervals = list(exports)
    return {intervals[int(str(number)) - 1]: int(str(count)) for number, count in rows}


def keep(
    session: Session, table: DestinationTable, export: str, interval: Interval, run_id: str, rows: Sequence[BadRow]
) -> None:
    """Set rows aside, with all that Postgres says of them. The same row of the same interval is kept once."""
    # One statement may not meet a row that it has just written.
    different = list({bad.row: bad for bad in rows}.values())
    for batch in _batches(different, size=lambda bad: len(bad.row)):
        session.execute(
            _KEEP.format(rejected=quoted(table.destination.schema, TABLE)),
            table.destination.table,
            export,
            interval.start,
            interval.end,
            run_id,
            [bad.row for bad in batch],
            [bad.key for bad in batch],
            [bad.fault.column for bad in batch],
            [bad.fault.words or bad.fault.reason for bad in batch],
            doing="setting rejected rows aside",
        )


Item = TypeVar("Item")


def _batches(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items, as many together as one statement takes."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (len(batch) == BATCH_ROWS or total + size(item) > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch
