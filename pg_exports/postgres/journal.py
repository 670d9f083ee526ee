"""Key journals: the identities of an interval's rows that are in a table, kept beside the ledger.

With them a re-run knows what is there without asking the table, so that its cost grows with the interval and not with the
table, and the table needs no index. Eight bytes a row, in pieces, as `bytea`; they commit with the rows. A row that was
rejected is in none. Journals may be pruned: a re-run of their intervals then asks the table.
"""

from collections.abc import Iterable, Iterator

import polars as pl
import pyarrow as pa

from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Interval
from pg_exports.models import IDENTITY
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable, ensure_own

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

# No interval is longer than a week and an hour, by which the index finds those that overlap.
OVERLAPPING = """
    destination = $1 AND table_oid = $2 AND table_filenode = $3 AND team_id = $4
    AND interval_start > $5::text::timestamptz - interval '8 days'
    AND interval_start < $6::text::timestamptz AND interval_end > $5::text::timestamptz
"""


def ensure(session: Session, schema: str) -> None:
    """Create the table where it is missing. Raises as `table.ensure_own`."""
    ensure_own(session, schema, TABLE, _CREATE.format(journal=quoted(schema, TABLE)))


def read(session: Session, table: DestinationTable, team_id: int, interval: Interval) -> pl.Series:
    """The identities of the team's rows of the interval that are in the table (UInt64, ascending)."""
    answer = session.arrow(
        f"SELECT keys FROM {quoted(table.destination.schema, TABLE)} WHERE {OVERLAPPING}",
        *table.identity,
        team_id,
        interval.start,
        interval.end,
        doing="reading the keys of earlier runs",
    )
    data = b"".join(value.as_py() for value in answer.column("keys"))
    keys = pa.Array.from_buffers(pa.uint64(), len(data) // 8, [None, pa.py_buffer(data)])
    return pl.Series(IDENTITY, keys, dtype=pl.UInt64).sort()


class Sieve:
    """Lets the rows of an interval through that no journal knows, and takes the fingerprint of all of them.

    Attributes:
        rows: how many came.
        known: how many of them it kept back.
        fingerprint: of all that came, where they have identities.
    """

    def __init__(self, keys: pl.Series) -> None:
        """`keys`: identities that are in the table, ascending."""
        self._keys = keys
        self.rows = 0
        self.known = 0
        self.fingerprint = Fingerprint()

    def sift(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The rows that are not known. Frames without identities pass as they are."""
        for frame in frames:
            self.rows += frame.height
            if IDENTITY not in frame.columns:
                yield frame
                continue
            identities = frame[IDENTITY]
            self.fingerprint += Fingerprint.of(identities)
            if self._keys.is_empty():
                yield frame
                continue
            # A sorted search: a hash table of all the keys, once for each frame, would take ten times as long.
            places = self._keys.search_sorted(identities).clip(0, len(self._keys) - 1)
            is_known = self._keys.gather(places) == identities
            self.known += int(is_known.sum())
            yield frame.filter(~is_known)


class Journal:
    """Writes the identities of rows that landed, a piece at a time, in the transaction that writes the rows.

    Attributes:
        written: how many.
    """

    def __init__(
        self, session: Session, table: DestinationTable, team_id: int, interval: Interval, export: str, run_id: str
    ) -> None:
        self._session = session
        self._table = table
        self._key = (
            *table.identity,
            team_id,
            interval.start,
            interval.end,
            export,
            run_id,
        )
        self._waiting: list[pl.Series] = []
        self.written = 0

    def add(self, rows: pl.DataFrame) -> None:
        """Rows that landed; without identities (of a model whose rows are merged) there is nothing to keep."""
        if IDENTITY in rows.columns:
            self._waiting.append(rows[IDENTITY])
            if sum(map(len, self._waiting)) >= PIECE:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        keys = pl.concat(self._waiting) if self._waiting else pl.Series(IDENTITY, [], pl.UInt64)
        for piece in range(0, len(keys), PIECE):
            some = keys[piece : piece + PIECE]
            self._session.execute(
                f"""
                INSERT INTO {quoted(self._table.destination.schema, TABLE)} (
                    destination, table_oid, table_filenode, team_id, interval_start, interval_end, export, run_id, keys
                )
                VALUES ($1, $2, $3, $4, $5::text::timestamptz, $6::text::timestamptz, $7, $8, $9)
                """,
                *self._key,
                _bytes(some),
                doing="writing the keys of the interval's rows",
            )
        self.written += len(keys)
        self._waiting = []


def _bytes(keys: pl.Series) -> bytes:
    """Eight bytes a key, the least significant first, as Arrow has them."""
    array = keys.rechunk().to_arrow()
    _, data = array.buffers()
    return bytes(data.slice(array.offset * 8, len(array) * 8))
