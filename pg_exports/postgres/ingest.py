"""Frames into a table by COPY, a bounded piece at a time; rows that Postgres refuses are taken out one by one."""

import re
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
) -> Copied:
    """COPY frames into the table `into` of the destination's schema, which has the destination's columns and types.

    Args:
        session: in a transaction.
        table: the destination.
        into: the destination itself, or a staging table.
        frames: rows with the model's columns.
        on_bad_rows: what to do with rows that Postgres cannot hold.
        set_aside: takes the rejected ones.

    Raises:
        DestinationError: a row cannot be held and `on_bad_rows` is `fail`, with the row's key; or Postgres refused for
            another reason than a value.
        PassingError: the connection broke.
    """
    rows = repaired = rejected = size = 0
    for frame in pieces(frames):
        found = bad_rows.sort_out(frame, table, on_bad_rows)
        good, refused = found.good, found.bad
        if not refused or on_bad_rows != "fail":
            good, by_copy = _copy(session, table, into, found, on_bad_rows)
            refused = refused + by_copy
        if refused and on_bad_rows == "fail":
            raise DestinationError(_failure(refused[0]))
        if refused:
            set_aside(refused)
        rows += good.height
        repaired += found.repaired
        rejected += len(refused)
        size += int(good.estimated_size())
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
            yield from _cut(pl.concat(waiting), size)
            waiting, size = [], 0
    if waiting:
        yield pl.concat(waiting)


def _cut(frame: pl.DataFrame, size: int) -> Iterator[pl.DataFrame]:
    parts = max(1, round(size / COPY_BYTES))
    return frame.iter_slices(-(-frame.height // parts))


def _copy(
    session: Session, table: DestinationTable, into: str, rows: SortedRows, on_bad_rows: OnBadRows
) -> tuple[pl.DataFrame, list[BadRow]]:
    """COPY one piece; gives the rows that went in, and those of which Postgres refused a value.

    COPY names the first row that it refuses. The rows before it are sent again, it is left out, and the rest follows in
    small lots that grow while they are good, so that a bad row costs one small COPY more and not the rest of the piece.
    """
    sent: list[pl.DataFrame] = []
    bad: list[BadRow] = []
    begin, lot = 0, rows.good.height
    while begin < rows.good.height:
        frame = rows.good[begin : begin + lot]
        session.execute("SAVEPOINT pg_exports_copy", doing="setting a savepoint")
        try:
            _send(session, table, into, frame)
        except dbapi.Error as error:
            row = _refused_row(error)
            if row is None or row >= frame.height:
                raise errors.during(error, f"copying rows into {table.qualified}") from None
            bad.append(
                bad_rows.bad_row(rows.as_they_were, begin + row, table.model, None, errors.server_message(error))
            )
            if on_bad_rows == "fail":
                break
            session.execute("ROLLBACK TO SAVEPOINT pg_exports_copy", doing="going back to a savepoint")
            if row:
                _send(session, table, into, frame[:row])
                sent.append(frame[:row])
            begin, lot = begin + row + 1, SMALL_LOT
        else:
            session.execute("RELEASE SAVEPOINT pg_exports_copy", doing="releasing a savepoint")
            sent.append(frame)
            begin, lot = begin + frame.height, lot * 2
    return pl.concat(sent) if sent else rows.good.clear(), bad


def _send(session: Session, table: DestinationTable, into: str, frame: pl.DataFrame) -> None:
    session.copy(table.destination.schema, into, types.arrow_table(frame, table.pairs))


def _refused_row(error: dbapi.Error) -> int | None:
    """Which row of a COPY it was (from 0), if Postgres refused one of its values: a data exception, or nesting too deep."""
    line = re.search(r"COPY .*?, line (\d+)", errors.server_message(error))
    is_about_a_value = (error.sqlstate or "").startswith(("22", "54001", "54000"))
    return int(line.group(1)) - 1 if line and is_about_a_value else None


def _failure(bad: BadRow) -> str:
    return (
        f"{bad.reason}\nThe row is the one with {bad.key}. No row of the interval was written. With `on_bad_rows: reject` "
        "such rows are set aside, and the others land."
    )
