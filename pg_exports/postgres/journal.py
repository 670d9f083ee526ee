"""Key journals: the identities of an interval's rows that are in a table, kept beside the ledger.

With them a re-run knows what is there without asking the table, so that its cost grows with the interval and not with the
table, and the table needs no index. Eight bytes a row, in pieces, as `bytea`; they commit with the rows. A row that was
rejected is in none. Journals may be pruned: a re-run of their intervals then asks the table.
"""

from collections.abc import Iterable, Iterator

import polars as pl
import pyarrow as pa

from pg_exports.interval import Interval
from pg_exports.models import IDENTITY
from pg_exports.postgres import schemas
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

TABLE = "pg_exports_keys"

PIECE = 65_536
"""Keys in one row of the table."""

_CREATE = """
CREATE TABLE IF NOT EXISTS {journal} (
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
    """Create the table where it is missing. Raises as `schemas.ensure_own`."""
    schemas.ensure_own(session, schema, TABLE, _CREATE.format(journal=quoted(schema, TABLE)))


def read(session: Session, table: DestinationTable, team_id: int, interval: Interval) -> pl.Series:
    """The identities of the team's rows of the interval that are in the table (UInt64, ascending)."""
    answer = session.arrow(
        f"""
        SELECT keys
        FROM {quoted(table.destination.schema, TABLE)}, (SELECT $5::text::timestamptz, $6::text::timestamptz) AS i(first, last)
        WHERE {OVERLAPPING}
        """,
        *table.identity,
        table.teams(team_id),
        interval.start,
        interval.end,
        doing="reading the keys of earlier runs",
    )
    data = b"".join(value.as_py() for value in answer.column("keys"))
    keys = pa.Array.from_buffers(pa.uint64(), len(data) // 8, [None, pa.py_buffer(data)])
    return pl.Series(IDENTITY, keys, dtype=pl.UInt64).sort()


class Sieve:
    """Lets the rows through that no journal knows.

    Attributes:
        known: how many it kept back.
    """

    def __init__(self, keys: pl.Series) -> None:
        """`keys`: identities that are in the table, ascending, at least one."""
        self._keys = keys
        self.known = 0

    def sift(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The rows that are not known."""
        for frame in frames:
            # A sorted search: a hash table of all the keys, once for each frame, would take ten times as long.
            identities = frame[IDENTITY]
            places = self._keys.search_sorted(identities).clip(0, len(self._keys) - 1)
            is_known = self._keys.gather(places) == identities
            self.known += int(is_known.sum())
            yield frame.filter(~is_known)


class Journal:
    """Writes the identities of rows that landed, some pieces at a time, in the transaction that writes the rows."""

    def __init__(self, session: Session, table: DestinationTable, team_id: int, export: str, run_id: str) -> None:
        self._session = session
        self._table = table
        self._key = (*table.identity, team_id, export, run_id)
        self._waiting: dict[Interval, list[pl.Series]] = {}
        self._count = 0

    def add(self, interval: Interval, identities: pl.Series) -> None:
        """Rows of an interval that landed."""
        self._waiting.setdefault(interval, []).append(identities)
        self._count += len(identities)
        if self._count >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        pieces = [
            (interval, keys[start : start + PIECE])
            for interval, keys in ((interval, pl.concat(some)) for interval, some in self._waiting.items())
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
        self._waiting, self._count = {}, 0


def _bytes(keys: pl.Series) -> bytes:
    """Eight bytes a key, the least significant first, as Arrow has them."""
    array = keys.rechunk().to_arrow()
    _, data = array.buffers()
    return bytes(data.slice(array.offset * 8, len(array) * 8))
