"""Frames into a table by COPY, a bounded piece at a time."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import polars as pl
from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres import errors, types
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import DestinationTable

COPY_BYTES = 32 * 1024 * 1024
"""Size of one COPY. Postgres's refusal of a row surfaces when its COPY ends: a bounded one fails early."""


@dataclass(frozen=True)
class Copied:
    """Rows that were sent, and their size as Arrow in bytes."""

    rows: int
    bytes: int


def copy_frames(session: Session, table: DestinationTable, into: str, frames: Iterable[pl.DataFrame]) -> Copied:
    """COPY frames into the table `into` of the destination's schema, which has the destination's columns and types.

    Raises:
        DestinationError: a value does not fit its column, or Postgres refused a row; with the row's key.
        PassingError: the connection broke.
    """
    rows = size = 0
    for frame in pieces(frames):
        batch = types.arrow_table(frame, table.pairs, table.model.key, table.qualified)
        try:
            session.copy(table.destination.schema, into, batch)
        except dbapi.Error as error:
            raise _refused(error, table, frame) from None
        rows += frame.height
        size += batch.nbytes
    return Copied(rows, size)


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


def _refused(error: dbapi.Error, table: DestinationTable, frame: pl.DataFrame) -> DestinationError | PassingError:
    refusal = errors.during(error, f"copying rows into {table.qualified}")
    line = re.search(r"COPY .*?, line (\d+)", errors.server_message(error))
    if line is None or isinstance(refusal, PassingError):
        return refusal
    row = frame.row(int(line.group(1)) - 1, named=True)
    key = ", ".join(f"{name} = {row[name]!r}" for name in table.model.key)
    return DestinationError(f"{refusal}\nThe row is the one with {key}. No row of the interval was written.")
