"""Frames into a table by COPY, a bounded piece at a time; rows that Postgres refuses are taken out one by one.

While Postgres takes one piece, the next is read, looked through and made ready in a thread of its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError
from pg_exports.interval import OnBadRows, Seconds
from pg_exports.models import INTERVAL
from pg_exports.postgres import bad_rows, errors, types
from pg_exports.postgres.bad_rows import BadRow, SortedRows
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable
from pg_exports.read_ahead import read_ahead

COPY_BYTES = 16 * 1024 * 1024
"""Size of one COPY. Postgres's refusal of a row surfaces when its COPY ends: a bounded one fails early. Between two Postgres
has nothing to do for some 10 ms.
"""

FIRST_COPY_BYTES = 512 * 1024
"""Size of the first one, so that Postgres need not wait for much; each is twice the one before, up to `COPY_BYTES`."""

BATCH_BYTES = 1024 * 1024
"""Size of one record batch, which the driver encodes as a whole before it sends it: Postgres must not run out of work
meanwhile. 400,000 events took 4.3 s by 1 or 4 MB, 5.4 s by 32 MB, and 4.7 s by 0.1 MB.
"""

PIECES_AHEAD = 1
"""Pieces that wait, ready, while Postgres takes one."""

SMALL_LOT = 256
"""Rows of the first COPY after one that Postgres refused."""

SetAside = Callable[[list[BadRow]], None]
"""Takes rows that were rejected, a piece's at a time."""

Landed = Callable[[pl.DataFrame, pl.Series], None]
"""Takes rows that were copied, a piece's at a time, with a mask of those that were repaired."""


@dataclass
class Copied:
    """Where the time went in which frames were copied, and how many values were repaired, by column."""

    seconds: Seconds = field(default_factory=Seconds)
    repaired: Counter[str] = field(default_factory=Counter)


def copy_frames(
    session: Session,
    table: DestinationTable,
    into: str,
    frames: Iterable[pl.DataFrame],
    on_bad_rows: OnBadRows,
    set_aside: SetAside,
    landed: Landed = lambda rows, repaired: None,
    interval_column: str | None = None,
) -> Copied:
    """COPY frames into the table `into` of the destination's schema, which has the destination's columns and types.

    Args:
        session: in a transaction.
        table: the destination.
        into: the destination itself, or a staging table.
        frames: rows with the model's columns, and those beside them.
        on_bad_rows: what to do with rows that Postgres cannot hold.
        set_aside: takes the rejected ones.
        landed: is told each piece's rows that went in, repaired where they were, with the columns beside the model's.
        interval_column: where a staging table keeps `INTERVAL`, if it does.

    Raises:
        DestinationError: a row cannot be held and `on_bad_rows` is `fail`, with the row's key; or Postgres refused for
            another reason than a row.
        PassingError: the connection broke.
    """
    copied = Copied()
    with read_ahead(_ready(frames, table, on_bad_rows, interval_column, copied), PIECES_AHEAD) as ready:
        for piece in ready:
            began = time.monotonic()
            _copy_piece(session, table, into, piece, on_bad_rows, set_aside, landed)
            copied.seconds.copy += time.monotonic() - began
            del piece
    return copied


@dataclass(frozen=True)
class _Piece:
    """Rows of one COPY, looked through, and those that can be sent in the destination's types."""

    rows: SortedRows
    table: pa.Table

    def batches(self, begin: int, count: int) -> pa.RecordBatchReader:
        """So many of the rows that can be sent."""
        rows = max(1, BATCH_BYTES * self.table.num_rows // max(1, self.rows.good.estimated_size()))
        some = self.table.slice(begin, count)
        return pa.RecordBatchReader.from_batches(some.schema, some.to_batches(max_chunksize=rows))


def _ready(
    frames: Iterable[pl.DataFrame],
    table: DestinationTable,
    on_bad_rows: OnBadRows,
    interval_column: str | None,
    copied: Copied,
) -> Iterator[_Piece]:
    asked = time.monotonic()
    for frame in pieces(frames):
        came = time.monotonic()
        rows = bad_rows.sort_out(frame, table, on_bad_rows)
        sent = types.arrow_table(rows.good, table.pairs)
        if interval_column:
            sent = sent.append_column(interval_column, rows.good[INTERVAL].to_arrow())
        copied.repaired += rows.repaired_values
        copied.seconds.source += came - asked
        copied.seconds.transform += time.monotonic() - came
        yield _Piece(rows, sent)
        asked = time.monotonic()


def _copy_piece(
    session: Session,
    table: DestinationTable,
    into: str,
    piece: _Piece,
    on_bad_rows: OnBadRows,
    set_aside: SetAside,
    landed: Landed,
) -> None:
    rows = piece.rows
    if rows.bad and on_bad_rows == "fail":
        raise DestinationError(_failure(rows.bad[0]))
    went_in, refused = _copy(session, table, into, piece, on_bad_rows)
    if refused and on_bad_rows == "fail":
        raise DestinationError(_failure(refused[0]))
    if rows.bad or refused:
        set_aside(rows.bad + refused)
    if refused:
        landed(rows.good.filter(went_in), rows.repaired.filter(went_in))
    else:
        landed(rows.good, rows.repaired)


def pieces(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows in frames of about `COPY_BYTES`, but for the first ones: small ones together, a great one cut up."""
    waiting: list[pl.DataFrame] = []
    size, enough = 0, FIRST_COPY_BYTES
    for frame in frames:
        if frame.is_empty():
            continue
        waiting.append(frame)
        size += int(frame.estimated_size())
        if size >= enough:
            yield from _cut(_together(waiting), size)
            waiting, size, enough = [], 0, min(2 * enough, COPY_BYTES)
    if waiting:
        yield _together(waiting)


def _cut(frame: pl.DataFrame, size: int) -> Iterator[pl.DataFrame]:
    parts = max(1, round(size / COPY_BYTES))
    return frame.iter_slices(-(-frame.height // parts))


def _together(frames: list[pl.DataFrame]) -> pl.DataFrame:
    # Not every frame has a column `AS_READ`.
    return pl.concat(frames, how="diagonal")


def _copy(
    session: Session, table: DestinationTable, into: str, piece: _Piece, on_bad_rows: OnBadRows
) -> tuple[pl.Series, list[BadRow]]:
    """COPY one piece; gives a mask of the rows that went in, and those that Postgres refused.

    COPY names the first row that it refuses. The rows before it are sent again, it is left out, and the rest follows in
    small lots that grow while they are good, so that a bad row costs one small COPY more and not the rest of the piece.
    """
    bad: dict[int, tuple[str | None, str]] = {}
    rows, height = piece.rows, piece.rows.good.height
    begin, lot = 0, height
    while begin < height:
        if begin in bad:
            begin, lot = begin + 1, SMALL_LOT
            continue
        size = min(lot, height - begin)
        session.execute("SAVEPOINT pg_exports_copy", doing="setting a savepoint")
        try:
            session.copy(table.destination.schema, into, piece.batches(begin, size))
        except dbapi.Error as error:
            row = _refused_row(error, into)
            if row is None or row >= size:
                session.explain(error, f"copying rows into {table.qualified}")
            bad[begin + row] = None, errors.server_message(error)
            if on_bad_rows == "fail":
                break
            session.execute("ROLLBACK TO SAVEPOINT pg_exports_copy", doing="going back to a savepoint")
            lot = row
        else:
            begin, lot = begin + size, lot * 2
        session.execute("RELEASE SAVEPOINT pg_exports_copy", doing="releasing a savepoint")
    went_in = bad_rows.mask(bad, height).not_()
    return went_in, bad_rows.bad_rows(rows.as_they_were, bad, table.model) if bad else []


# A data exception, a constraint that is about rows, a value too long or nested too deep.
_ABOUT_A_ROW = ("22", "23", "54000", "54001")


def _refused_row(error: dbapi.Error, into: str) -> int | None:
    """Which row of a COPY it was (from 0), if Postgres refused it for what it holds."""
    line = errors.copy_line(error, into)
    return line - 1 if line and (error.sqlstate or "").startswith(_ABOUT_A_ROW) else None


def _failure(bad: BadRow) -> str:
    return (
        f"{bad.reason}\nThe row is the one with {bad.key}. No row of the interval was written. With `on_bad_rows: reject` "
        "such rows are set aside, and the others land."
    )
