"""From a frame's columns to what COPY must be given for the destination's own types.

Binary COPY trusts the sender: a 64-bit number into a DOUBLE column "succeeds" with another value. So every pair of a
column's kind and a destination's type is either listed here or an error before a row is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from pg_exports.errors import DestinationError
from pg_exports.models import Column, Kind


@dataclass(frozen=True)
class DestinationColumn:
    """A column of the destination table as its catalog has it. `type` is the base type's name, `length` VARCHAR's n."""

    name: str
    type: str
    declared: str
    length: int | None
    not_null: bool
    has_default: bool
    generated: bool


def _as_is(values: pl.Series) -> pa.Array:
    return values.to_arrow()


def _cast(dtype: pl.DataType) -> Callable[[pl.Series], pa.Array]:
    return lambda values: values.cast(dtype).to_arrow()


def _json(values: pl.Series) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(pa.large_string()), values.to_arrow().cast(pa.large_string()))


def _numeric(values: pl.Series) -> pa.Array:
    return values.to_arrow().cast(pa.decimal128(20, 0))


def _uuid(values: pl.Series) -> pa.Array:
    return values.str.replace_all("-", "", literal=True).str.decode("hex").to_arrow()


def _in_utc(values: pl.Series) -> pa.Array:
    return values.dt.replace_time_zone(None).to_arrow()


_TEXT_TYPES = ("text", "varchar", "bpchar", "citext")

_CONVERSIONS: Mapping[Kind, Mapping[str, Callable[[pl.Series], pa.Array]]] = {
    Kind.TEXT: {**dict.fromkeys(_TEXT_TYPES, _as_is), "uuid": _uuid},
    Kind.JSON: {"jsonb": _json, "json": _as_is, **dict.fromkeys(_TEXT_TYPES, _as_is)},
    Kind.INTEGER: {
        "int2": _cast(pl.Int16()),
        "int4": _cast(pl.Int32()),
        "int8": _as_is,
        "numeric": _numeric,
        **dict.fromkeys(_TEXT_TYPES, _cast(pl.String())),
    },
    Kind.FLOAT: {"float8": _as_is},
    Kind.BOOLEAN: {"bool": _as_is},
    Kind.TIMESTAMP: {"timestamptz": _as_is, "timestamp": _in_utc},
    Kind.TEXT_LIST: {"_text": _as_is, "_varchar": _as_is},
}
"""How a kind of column is sent to each type that can hold it. TIMESTAMP without time zone gets the time in UTC."""


def check_pair(source: Column, destination: DestinationColumn, table: str) -> None:
    """Make sure that the destination's type can hold the column's values.

    Raises:
        DestinationError: it cannot; with the column, both types and the statement that mends it.
    """
    if destination.type not in _CONVERSIONS[source.kind]:
        raise DestinationError(
            f"Column {source.name} of {table} is {destination.declared}, which cannot hold the export's "
            f'{source.postgres_type}. Change it (ALTER TABLE {table} ALTER COLUMN "{source.name}" TYPE '
            f"{source.postgres_type} USING ...), rename it, or export to another table."
        )


def arrow_table(
    frame: pl.DataFrame, pairs: list[tuple[Column, DestinationColumn]], key: tuple[str, ...], table: str
) -> pa.Table:
    """A frame's columns in the destination's types and order, as Arrow.

    Args:
        frame: rows with the model's columns.
        pairs: the columns that both sides have, each with the destination's.
        key: names of the columns that identify a row, for errors.
        table: the destination, for errors.

    Raises:
        DestinationError: a value is too great or too long for its column; with the column, the value's row and the
            remedy.
    """
    columns = {}
    for source, destination in pairs:
        values = frame[source.name]
        if source.kind is Kind.INTEGER and destination.type in _INTEGER_BOUNDS:
            bound = _INTEGER_BOUNDS[destination.type]
            _refuse(values.is_between(-bound, bound - 1).not_(), frame, source, destination, key, table)
        if destination.length is not None and source.kind is not Kind.TEXT_LIST:
            _refuse(values.cast(pl.String).str.len_chars() > destination.length, frame, source, destination, key, table)
        columns[source.name] = _CONVERSIONS[source.kind][destination.type](values)
    return pa.table(columns)


_INTEGER_BOUNDS = {"int2": 2**15, "int4": 2**31}


def _refuse(
    misfits: pl.Series,
    frame: pl.DataFrame,
    source: Column,
    destination: DestinationColumn,
    key: tuple[str, ...],
    table: str,
) -> None:
    first = misfits.arg_max() if misfits.any() else None
    if first is None:
        return
    row = ", ".join(f"{name} = {frame[name][first]!r}" for name in key if name in frame.columns)
    wider = "BIGINT" if source.kind is Kind.INTEGER else "TEXT"
    raise DestinationError(
        f"Column {source.name} of {table} is {destination.declared} and cannot hold the value of the row with {row}. "
        f'No row of the interval was written. Widen it: ALTER TABLE {table} ALTER COLUMN "{source.name}" TYPE {wider};'
    )
