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
from pg_exports.postgres import bad_rows, messages, types
from pg_exports.postgres.bad_rows import BadRow, Fault, SortedRows
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
"""Rows of the first COPY after a row that Postgres refused and named."""

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
    _check_constraints_at_once(session, table)
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

    A row is refused only if Postgres refuses it alone, once those before it are in. Where COPY names a row, those before
    it are sent, and then that one alone; the rest follows in small lots that grow while they are good. Where it names none,
    or not the right one, the lot is halved.
    """
    bad: dict[int, Fault] = {}
    rows, height = piece.rows, piece.rows.good.height
    begin, lot = 0, height
    # Before `suspect` there is a row that was refused among others; `is_named`: the lot ends before one that COPY has named.
    suspect, is_named = 0, False
    is_about_rows = False
    error: dbapi.Error | None = None
    session.execute(_SAVEPOINT, doing="setting a savepoint")
    while begin < height:
        size = min(lot, height - begin)
        error = _refused(session, table, into, piece.batches(begin, size))
        if error is None:
            begin += size
            lot = max(1, (suspect - begin) // 2) if begin < suspect else lot * 2
            is_named = False
            session.execute("RELEASE SAVEPOINT pg_exports_copy", doing="releasing a savepoint")
            if begin < height:
                session.execute(_SAVEPOINT, doing="setting a savepoint")
            continue
        row = messages.copy_line(error, into)
        if size == 1:
            # What a trigger refuses of each statement is no row's fault.
            if row is None and not is_about_rows:
                of_none = _refused(session, table, into, piece.batches(begin, 0))
                if of_none:
                    raise DestinationError(
                        f"{table.qualified} refuses even a COPY of no rows: {messages.whole(of_none)}"
                    )
            is_about_rows = is_about_rows or row is None
            bad[begin] = _fault(error, table, into)
            if on_bad_rows == "fail":
                break
            begin, lot, suspect = begin + 1, SMALL_LOT if row else 1, 0
        elif row and row <= size and not is_named:
            lot, suspect, is_named = max(1, row - 1), begin + row, row > 1
        else:
            lot, suspect, is_named = size // 2, begin + size, False
    if error:
        session.execute("RELEASE SAVEPOINT pg_exports_copy", doing="releasing a savepoint")
    went_in = bad_rows.mask(bad, height).not_()
    return went_in, bad_rows.bad_rows(rows.as_they_were, bad, table.model) if bad else []


def _fault(error: dbapi.Error, table: DestinationTable, into: str) -> Fault:
    column = messages.copy_column(error, into)
    column = column if column in table.column_names else None
    at = f" at its column {column}" if column else ""
    # Not by the name of a staging table.
    shown, whole = messages.shown(error, of_rows=True), messages.whole(error)
    shown, whole = (text.replace(into, table.destination.table) for text in (shown, whole))
    return Fault(column, f"Postgres refuses the row{at}: {shown}.", whole)


def _refused(session: Session, table: DestinationTable, into: str, batches: pa.RecordBatchReader) -> dbapi.Error | None:
    """COPY some rows, all or none; gives Postgres's refusal if it is about what a row holds. Raises any other one."""
    try:
        session.copy(table.destination.schema, into, batches)
    except dbapi.Error as error:
        if not (error.sqlstate or "").startswith(_ABOUT_A_ROW):
            session.explain(error, f"copying rows into {table.qualified}", of_rows=True)
        session.execute("ROLLBACK TO SAVEPOINT pg_exports_copy", doing="going back to a savepoint")
        if error.sqlstate == _FOREIGN_KEY and _refers_to_itself(session, table, messages.constraint(error)):
            session.explain(error, f"copying rows into {table.qualified}, which refers to itself", of_rows=True)
        return error
    return None


_SAVEPOINT = "SAVEPOINT pg_exports_copy"

# A trigger's query that finds too many rows, a data exception, a constraint that is about rows, a value too long or nested too
# deep, what a trigger raises.
_ABOUT_A_ROW = ("21", "22", "23", "54000", "54001", "P0")

_FOREIGN_KEY = "23503"


def _check_constraints_at_once(session: Session, table: DestinationTable) -> None:
    """Have the table's deferred constraints checked by each statement of the transaction: COMMIT would name no row.

    All but its foreign keys to itself: a row's parent may come later.
    """
    [(deferred,)] = session.rows(
        f"""
        SELECT string_agg(DISTINCT format('%s.%I', connamespace::regnamespace, conname), ', ')
        FROM pg_constraint
        WHERE conrelid IN ({_WITH_PARTITIONS}) AND condeferred AND NOT (contype = 'f' AND confrelid IN ({_WITH_PARTITIONS}))
        """,
        table.oid,
        doing="reading the table's constraints",
    )
    if deferred:
        session.execute(f"SET CONSTRAINTS {deferred} IMMEDIATE", doing="having constraints checked at once")


def _refers_to_itself(session: Session, table: DestinationTable, constraint: str) -> bool:
    """Whether it is a foreign key of the table to itself. A row that it refuses may be good: its parent may come later."""
    sql = f"""
        SELECT FROM pg_constraint
        WHERE conrelid IN ({_WITH_PARTITIONS}) AND confrelid IN ({_WITH_PARTITIONS})
            AND contype = 'f' AND conname = $2
    """
    return bool(session.rows(sql, table.oid, constraint, doing="reading the table's constraints"))


_WITH_PARTITIONS = "SELECT $1::bigint::oid UNION ALL SELECT relid FROM pg_partition_tree($1::bigint::oid)"


def _failure(bad: BadRow) -> str:
    return (
        f"{bad.fault.reason}\nThe row is the one with {bad.key}. No row of the interval was written. With "
        "`on_bad_rows: reject` such rows are set aside, with all that Postgres says of them, and the others land."
    )
