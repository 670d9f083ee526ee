"""Key journals: the hashes of an interval's rows that were exported, kept beside the ledger.

Of a model whose rows are appended these are their identities. With them a re-run knows what is there without asking the
table, so that its cost grows with the interval and not with the table, and the table needs no index. A row that was
rejected and is not in the table is in none. Of a merged model they are the states of all rows that were read: by them late
rows are found.

Eight bytes a row, in pieces, as `bytea`; they commit with the rows. Journals may be pruned: a re-run of their intervals then
asks the table.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from pg_exports.interval import Interval
from pg_exports.models import IDENTITY
from pg_exports.postgres import own_tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = own_tables.JOURNAL

PIECE = 65_536
"""Keys in one row of the table."""

_CREATE = """
CREATE TABLE {journal} (
    destination text NOT NULL,
    table_oid bigint NOT NULL,
    table_filenode bigint NOT NULL,
    team_id bigint NOT NULL,
    interval_start timestamptz NOT NULL,
    interval_end timestamptz NOT NULL,
    export text NOT NULL,
    run_id text NOT NULL,
    piece bigint GENERATED ALWAYS AS IDENTITY,
    keys bytea NOT NULL,
    PRIMARY KEY (destination, table_oid, table_filenode, team_id, interval_start, interval_end, export, run_id, piece)
)
"""

# What overlaps `[first, last)`. No interval is longer than a week and an hour, by which the index finds those that do.
OVERLAPPING = """
    destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = ANY($4::text::bigint[])
    AND interval_start > first - interval '8 days' AND interval_start < last AND interval_end > first
"""


def ensure(session: Session, schema: str) -> None:
    """Create the table where it is missing. Raises as `own_tables.ensure`."""
    own_tables.ensure(session, schema, TABLE, _CREATE.format(journal=quoted(schema, TABLE)))


@dataclass(frozen=True)
class Recorded:
    """The hashes that the journals have of an interval (UInt64, ascending).

    Attributes:
        keys: of all exports and intervals that overlap it.
        own: of the export's own journals of this very interval, each once.
    """

    keys: pl.Series
    own: pl.Series


NOTHING = Recorded(pl.Series(dtype=pl.UInt64), pl.Series(dtype=pl.UInt64))
"""What the journals have of an interval that no run has written."""


def read(
    session: Session, table: DestinationTable, team_id: int, export: str, intervals: Sequence[Interval]
) -> dict[int, Recorded]:
    """What the journals have of the team's rows of each interval, by the interval's position."""
    if not intervals:
        return {}
    answer = session.arrow(
        f"""
        SELECT number, interval_start = first AND interval_end = last AND export = $7 AS is_own, keys
        FROM {quoted(table.destination.schema, TABLE)}
        JOIN unnest($5::text[]::timestamptz[], $6::text[]::timestamptz[]) WITH ORDINALITY AS asked(first, last, number)
            ON {OVERLAPPING}
        """,
        *table.identity,
        table.teams(team_id),
        [interval.start.isoformat() for interval in intervals],
        [interval.end.isoformat() for interval in intervals],
        export,
        doing="reading the keys of earlier runs",
    )
    pieces: dict[int, list[tuple[bool, pl.Series]]] = {}
    for number, is_own, keys in zip(*(answer.column(name).to_pylist() for name in answer.column_names), strict=True):
        pieces.setdefault(intervals[number - 1].position, []).append((is_own, series(keys)))
    return {
        position: Recorded(
            pl.concat([keys for _, keys in some]).sort(),
            pl.concat([NOTHING.own, *(keys for is_own, keys in some if is_own)]).unique().sort(),
        )
        for position, some in pieces.items()
    }


def forget(session: Session, table: DestinationTable, team_id: int, export: str, intervals: Sequence[Interval]) -> None:
    """Empty the export's own journals of these very intervals: their hashes are of another scheme, and tell nothing."""
    session.execute(
        f"""
        UPDATE {quoted(table.destination.schema, TABLE)} SET keys = ''
        FROM unnest($5::text[]::timestamptz[], $6::text[]::timestamptz[]) AS asked(first, last)
        WHERE {OVERLAPPING} AND interval_start = first AND interval_end = last AND export = $7
        """,
        *table.identity,
        table.teams(team_id),
        [interval.start.isoformat() for interval in intervals],
        [interval.end.isoformat() for interval in intervals],
        export,
        doing="emptying the journals of another scheme",
    )


def series(keys: bytes) -> pl.Series:
    """The keys of one row of the table."""
    array = pa.Array.from_buffers(pa.uint64(), len(keys) // 8, [None, pa.py_buffer(keys)])
    return pl.Series(array, dtype=pl.UInt64)


def among(hashes: pl.Series, keys: pl.Series) -> pl.Series:
    """A mask of those hashes that are among keys, which are ascending."""
    if keys.is_empty():
        return pl.repeat(False, len(hashes), dtype=pl.Boolean, eager=True)
    # A sorted search: a hash table of all the keys, once for each frame, would take ten times as long.
    places = keys.search_sorted(hashes).clip(0, len(keys) - 1)
    return keys.gather(places) == hashes


class Sieve:
    """Lets the rows through that no journal knows.

    Attributes:
        keys: identities of rows that are in the table, ascending, at least one.
        known: how many it kept back.
    """

    def __init__(self, keys: pl.Series) -> None:
        self.keys = keys
        self.known = 0

    def sift(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The rows that are not known."""
        for frame in frames:
            is_known = self._are_known(frame)
            self.known += int(is_known.sum())
            yield frame.filter(~is_known)

    def kept_back(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The rows that are known."""
        for frame in frames:
            yield frame.filter(self._are_known(frame))

    def _are_known(self, frame: pl.DataFrame) -> pl.Series:
        return among(frame[IDENTITY], self.keys)


class Journal:
    """Writes the identities of rows that landed, some pieces at a time, in the transaction that writes the rows."""

    def __init__(self, session: Session, table: DestinationTable, team_id: int, export: str, run_id: str) -> None:
        self._session = session
        self._table = table
        self._key = (*table.identity, team_id, export, run_id)
        # Of a merged model the thread that reads adds to it.
        self._added: deque[tuple[Interval, pl.Series]] = deque()

    def add(self, interval: Interval, hashes: pl.Series) -> None:
        """Rows of an interval, to be written with the next `flush`. Any thread may add."""
        if len(hashes):
            self._added.append((interval, hashes))

    def flush(self, at_least: int = 1) -> None:
        """Write what was added, if there is as much."""
        if sum(len(hashes) for _, hashes in tuple(self._added)) < at_least:
            return
        waiting: dict[Interval, list[pl.Series]] = {}
        while self._added:
            interval, hashes = self._added.popleft()
            waiting.setdefault(interval, []).append(hashes)
        pieces = [
            (interval, keys[start : start + PIECE])
            for interval, keys in ((interval, pl.concat(some)) for interval, some in waiting.items())
            for start in range(0, len(keys), PIECE)
        ]
        if pieces:
            self._session.execute(
                f"""
                INSERT INTO {quoted(self._table.destination.schema, TABLE)} (
                    destination, table_oid, table_filenode, team_id, export, run_id, interval_start, interval_end, keys
                )
                SELECT $1, $2, $3, $4, $5, $6, piece.*
                FROM unnest($7::text[]::timestamptz[], $8::text[]::timestamptz[], $9::bytea[]) AS piece
                """,
                *self._key,
                [interval.start.isoformat() for interval, _ in pieces],
                [interval.end.isoformat() for interval, _ in pieces],
                [_bytes(keys) for _, keys in pieces],
                doing="writing the keys of the intervals' rows",
            )


def _bytes(keys: pl.Series) -> bytes:
    """Eight bytes a key, the least significant first, as Arrow has them."""
    array = keys.rechunk().to_arrow()
    _, data = array.buffers()
    return bytes(data.slice(array.offset * 8, len(array) * 8))
