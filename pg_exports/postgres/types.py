"""From a frame's columns to what COPY must be given for the destination's own types.

Binary COPY trusts the sender: a 64-bit number into a DOUBLE column "succeeds" with another value. So every pair of a
column's kind and a destination's type is either listed here or an error before a row is sent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pyarrow as pa

from pg_exports.errors import DestinationError
from pg_exports.models import Column, Kind, Model


@dataclass(frozen=True)
class DestinationColumn:
    """A column of the destination table as its catalog has it.

    Attributes:
        type: the base type's name; `declared` is the type as the table's owner wrote it.
        length: n of VARCHAR(n) and CHAR(n).
        digits: how many fractional digits a time or a NUMERIC is rounded to, if it is.
        collation: the column's collation, if it takes different texts for equal.
    """

    name: str
    type: str
    declared: str
    length: int | None
    not_null: bool
    has_default: bool
    generated: bool
    digits: int | None = None
    collation: str | None = None


# Text as Arrow's views, which Polars has: any other layout would be a copy of every byte.
_VIEWS = pl.CompatLevel.newest()


def _as_is(values: pl.Series) -> pa.Array:
    return values.to_arrow(compat_level=_VIEWS)


def _cast(dtype: pl.DataType) -> Callable[[pl.Series], pa.Array]:
    return lambda values: _as_is(values.cast(dtype))


def _json(values: pl.Series) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(pa.string_view()), _as_is(values))


def _numeric(values: pl.Series) -> pa.Array:
    return _as_is(values).cast(pa.decimal128(20, 0))


def _uuid(values: pl.Series) -> pa.Array:
    return values.str.replace_all("-", "", literal=True).str.decode("hex").to_arrow()


def _in_utc(values: pl.Series) -> pa.Array:
    return _as_is(values.dt.replace_time_zone(None))


TEXT_TYPES = ("text", "varchar", "bpchar", "citext")

_CONVERSIONS: Mapping[Kind, Mapping[str, Callable[[pl.Series], pa.Array]]] = {
    Kind.TEXT: {**dict.fromkeys(TEXT_TYPES, _as_is), "uuid": _uuid},
    Kind.JSON: {"jsonb": _json, "json": _as_is, **dict.fromkeys(TEXT_TYPES, _as_is)},
    Kind.INTEGER: {
        "int2": _cast(pl.Int16()),
        "int4": _cast(pl.Int32()),
        "int8": _as_is,
        "numeric": _numeric,
        **dict.fromkeys(TEXT_TYPES, _cast(pl.String())),
    },
    Kind.FLOAT: {"float8": _as_is},
    Kind.BOOLEAN: {"bool": _as_is},
    Kind.DATE: {"date": _as_is},
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


@dataclass(frozen=True)
class Blur:
    """Why a column takes values for equal that differ at the source, the type that does not, and whether the values that
    are there have lost what they differed in.
    """

    reason: str
    remedy: str
    is_lossy: bool


def blur(source: Column, destination: DestinationColumn) -> Blur | None:
    """What keeps the destination's column from telling the source's values apart, if anything does.

    For the columns of a key or a version alone. UUIDs are no such case, as `misfit` lets one spelling of each through.
    """
    if destination.collation:
        reason = f"takes texts for equal that its collation {destination.collation} does"
        return Blur(reason, f'{destination.declared} COLLATE "default"', is_lossy=False)
    if source.kind is Kind.TEXT and destination.type == "citext":
        return Blur("takes upper and lower case for equal", "TEXT", is_lossy=False)
    if source.kind is Kind.TEXT and destination.type == "bpchar":
        return Blur("cuts off blanks at the end", "TEXT", is_lossy=True)
    is_rounded = destination.digits is not None and destination.digits < _DIGITS.get(source.kind, 0)
    return Blur("rounds its values", _WHOLE[destination.type], is_lossy=True) if is_rounded else None


_DIGITS = {Kind.TIMESTAMP: 6}
"""Fractional digits of a kind's values."""

_WHOLE = {"timestamptz": "TIMESTAMP WITH TIME ZONE", "timestamp": "TIMESTAMP", "numeric": "NUMERIC"}
"""The types that may round, without what makes them do so."""


def arrow_table(frame: pl.DataFrame, pairs: Sequence[tuple[Column, DestinationColumn]]) -> pa.Table:
    """A frame's columns in the destination's types, as Arrow; `bad_rows` has made sure that the values fit.

    Args:
        frame: rows with the model's columns.
        pairs: the columns that both sides have, each with the destination's.
    """
    return pa.table(
        {source.name: _CONVERSIONS[source.kind][destination.type](frame[source.name]) for source, destination in pairs}
    )


def misfits(
    values: pl.Series, source: Column, destination: DestinationColumn, model: Model
) -> Iterator[tuple[pl.Series, str | None]]:
    """Masks of the values that the destination's column cannot hold, each with what to do to the column so that it can (ALTER
    COLUMN ...); None where nothing helps.

    Of a UUID by which rows are told apart it holds the spelling that Postgres gives it, and no other: texts that differ at the
    source must not become equal.
    """
    is_merge_key = bool(model.merge) and source.name in model.key
    if source.kind is Kind.INTEGER and destination.type in INTEGER_BOUNDS:
        bound = INTEGER_BOUNDS[destination.type]
        yield values.is_between(-bound, bound - 1).not_(), "TYPE BIGINT"
    if destination.length is not None and source.kind is not Kind.TEXT_LIST:
        yield values.cast(pl.String).str.len_chars() > destination.length, "TYPE TEXT"
    if destination.type == "uuid":
        yield values.str.contains(_CANONICAL_UUID if source.name in model.compared else _UUID).not_(), "TYPE TEXT"
    if (destination.not_null or is_merge_key) and values.has_nulls():
        yield values.is_null(), None if is_merge_key else "DROP NOT NULL"


_CANONICAL_UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
_UUID = rf"(?i){_CANONICAL_UUID}"

INTEGER_BOUNDS = {"int2": 2**15, "int4": 2**31}

_TIMESTAMPS, _DATES = (-210_866_803_200_000_000, 2**63 - 1), (-2_440_588, 2_145_042_905)
TIME_BOUNDS = {"timestamptz": _TIMESTAMPS, "timestamp": _TIMESTAMPS, "date": _DATES}
"""The first and the last that each type can hold, since 1970: microseconds, of which a frame has no later ones, or days."""


def past_range(values: pl.Series, destination: DestinationColumn) -> pl.Series:
    """Which times and dates the destination's type cannot hold. COPY refuses them all but one, which is '-infinity' there."""
    if destination.type not in TIME_BOUNDS:
        return pl.repeat(False, len(values), eager=True)
    return values.to_physical().is_between(*TIME_BOUNDS[destination.type]).not_().fill_null(value=False)


def range_text(destination: DestinationColumn) -> tuple[str, str]:
    """The first and the last time of the destination's type that an export can write."""
    first, last = TIME_BOUNDS[destination.type]
    text = date_text if destination.type == "date" else time_text
    return text(first), text(last)


# The calendar repeats itself after 400 years.
_CYCLE_YEARS, _CYCLE_DAYS, _DAY = 400, 146_097, 86_400_000_000


def time_text(microseconds: int) -> str:
    """A time in UTC as text, of any year. Python has 1 to 9999.

    Args:
        microseconds: since 1970.
    """
    cycles, rest = divmod(microseconds, _CYCLE_DAYS * _DAY)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=rest)
    return _with_year(str(moment), moment.year + cycles * _CYCLE_YEARS)


def date_text(days: int) -> str:
    """A date as text, of any year, from the days since 1970."""
    cycles, rest = divmod(days, _CYCLE_DAYS)
    day = date(1970, 1, 1) + timedelta(days=rest)
    return _with_year(str(day), day.year + cycles * _CYCLE_YEARS)


def _with_year(text: str, year: int) -> str:
    """A text that begins with a year, with another year. As Postgres has it, there is none between 1 BC and 1."""
    return f"{year:04d}{text[4:]}" if year > 0 else f"{1 - year:04d}{text[4:]} BC"


def moment(microseconds: int) -> datetime | None:
    """So many microseconds after 1970 began, in UTC; None if that is outside the years 1 to 9999."""
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    except OverflowError:
        return None
