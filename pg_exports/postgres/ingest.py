"""Frames into a table by COPY, a bounded piece at a time; rows that Postgres refuses are taken out one by one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import polars as pl
from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError
from pg_exports.interval import OnBadRows
from pg_exports.postgres import bad_rows, errors, types
from pg_exports.postgres.bad_rows import BadRow, SortedRows
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

COPY_BYTES = 32 * 1024 * 1024
"""Size of one COPY. Postgres's refusal of a row surfaces when its COPY ends: a bounded one fails early."""


SMALL_LOT = 256
"""Rows of the first COPY after one that Postgres refused."""

SetAside = Callable[[list[BadRow]], None]
"""Takes rows that were rejected, a piece's at a time."""

Landed = Callable[[pl.DataFrame], None]
"""Takes rows that were copied, a piece's at a time."""


@dataclass(frozen=True)
class Copied:
    """Rows that were sent, how many of them repaired, rows that were rejected, and what was sent as Arrow in bytes."""

    rows: int
    repaired: int
    rejected: int
    bytes: int


def copy_frames(
    session: Session,
    table: DestinationTable,
    into: str,
    frames: Iterable[pl.DataFrame],
    on_bad_rows: OnBadRows,
    set_aside: SetAside,
    landed: Landed = lambda rows: None,
) -> Copied:
    """COPY frames into the table `into` of the destination's schema, which has the destination's columns and types.

    Args:
        session: in a transaction.
        table: the destination.
        into: the destination itself, or a staging table.
        frames: rows with the model's columns, and those beside them.
        on_bad_rows: what to do with rows that Postgres cannot hold.
        set_aside: takes the rejected ones.
        landed: is told each piece's rows that went in, repaired where they were, with `IDENTITY`.

    Raises:
        DestinationError: a row cannot be held and `on_bad_rows` is `fail`, with the row's key; or Postgres refused for
            another reason than a row.
        PassingError: the connection broke.
    """
    rows = repaired = rejected = size = 0
    for frame in pieces(frames):
        found = bad_rows.sort_out(frame, table, on_bad_rows)
        if found.bad and on_bad_rows == "fail":
            raise DestinationError(_failure(found.bad[0]))
        went_in, refused = _copy(session, table, into, found, on_bad_rows)
        if refused and on_bad_rows == "fail":
            raise DestinationError(_failure(refused[0]))
        bad = found.bad + refused
        if bad:
            set_aside(bad)
        good = found.good.filter(went_in) if refused else found.good
        landed(good)
        rows += good.height
        repaired += int((found.repaired & went_in).sum())
        rejected += len(bad)
        size += int(good.select(table.column_names).estimated_size())
    return Copied(rows, repaired, rejected, size)


def pieces(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows in frames of about `COPY_BYTES`: small ones together, a great one cut up."""
    waiting: list[pl.DataFrame] = []
    size = 0
    for frame in frames:
        if frame.is_empty():
            continue
        waiting.append(frame)
        size += int(frame.estimated_size())
        if size >= COPY_BYTES:
            yield from _cut(_together(waiting), size)
            waiting, size = [], 0
    if waiting:
        yield _together(waiting)


def _cut(frame: pl.DataFrame, size: int) -> Iterator[pl.DataFrame]:
    parts = max(1, round(size / COPY_BYTES))
    return frame.iter_slices(-(-frame.height // parts))


def _together(frames: list[pl.DataFrame]) -> pl.DataFrame:
    # Not every frame has a column `AS_READ`.
    return pl.concat(frames, how="diagonal")


def _copy(
    session: Session, table: DestinationTable, into: str, rows: SortedRows, on_bad_rows: OnBadRows
) -> tuple[pl.Series, list[BadRow]]:
    """COPY one piece; gives a mask of the rows that went in, and those that Postgres refused.

    COPY names the first row that it refuses. The rows before it are sent again, it is left out, and the rest follows in
    small lots that grow while they are good, so that a bad row costs one small COPY more and not the rest of the piece.
    """
    bad: dict[int, tuple[str | None, str]] = {}
    begin, lot = 0, rows.good.height
    while begin < rows.good.height:
        if begin in bad:
            begin, lot = begin + 1, SMALL_LOT
            continue
        frame = rows.good[begin : begin + lot]
        session.execute("SAVEPOINT pg_exports_copy", doing="setting a savepoint")
        try:
            _send(session, table, into, frame)
        except dbapi.Error as error:
            row = _refused_row(error, into)
            if row is None or row >= frame.height:
                session.explain(error, f"copying rows into {table.qualified}")
            bad[begin + row] = None, errors.server_message(error)
            if on_bad_rows == "fail":
                break
            session.execute("ROLLBACK TO SAVEPOINT pg_exports_copy", doing="going back to a savepoint")
            lot = row
        else:
            begin, lot = begin + frame.height, lot * 2
        session.execute("RELEASE SAVEPOINT pg_exports_copy", doing="releasing a savepoint")
    went_in = bad_rows.mask(bad, rows.good.height).not_()
    return went_in, bad_rows.bad_rows(rows.as_they_were, bad, table.model) if bad else []


def _send(session: Session, table: DestinationTable, into: str, frame: pl.DataFrame) -> None:
    session.copy(table.destination.schema, into, types.arrow_table(frame, table.pairs))


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
