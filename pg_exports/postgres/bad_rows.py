"""Rows that Postgres cannot hold as they are: found before they are sent where that is cheap, repaired or set aside.

What has a faithful nearest value is repaired: a NUL, a lone surrogate or a sequence of bytes that is no UTF-8 becomes
U+FFFD, and nothing else in the row changes. What has none is rejected: a number or text that its column cannot hold, a
bad value in a merge's key (two might be repaired into one), and what only Postgres itself recognises as bad, such as its
COPY refuses.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from pg_exports.interval import OnBadRows
from pg_exports.models import AS_READ, IDENTITY, INTERVAL, STATE, Column, Kind, Model, as_read
from pg_exports.postgres import types
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.table import DestinationTable
from pg_exports.postgres.types import DestinationColumn

KEY_BYTES = 2_600
"""Longest key of a merge. A B-tree's entry may have 2,704 bytes, of which some are its own."""

ROW_BYTES, KEPT_CHARACTERS = 512 * 1024 * 1024, 1_000_000
"""A rejected row is kept whole up to so many bytes of JSON, as Postgres takes no statement of 1 GB; of a greater one, so
many characters of each text."""

REPLACEMENT = "\ufffd"

# What a document with a NUL or a lone surrogate must hold; \\ud also begins Hangul and whole pairs, which are looked at
# more closely below. A search for these costs 45 ms a million rows of 0.7 KB.
_SUSPICIOUS = ["\0", "\\u0000", "\\ud", "\\uD"]

_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPED_BACKSLASH = "\\\\"

# Every escape is consumed whole, from left to right: in \\\\u0000 the second backslash is escaped, and the rest is text.
_ESCAPE = re.compile(rf"{_PAIR}|\\u(?P<code>[0-9a-fA-F]{{4}})|\\.", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row.

    Attributes:
        column: at fault, where that is known.
        reason: for a person. It quotes nothing of the row, as it goes to logs and to Dagster.
        words: the same with the value, or in Postgres's own words, to be kept with the row.
    """

    column: str | None
    reason: str
    words: str | None = None

    def with_note(self, note: str) -> "Fault":
        """The same, and something else to know of the row."""
        return Fault(self.column, f"{self.reason}\n{note}", self.words and f"{self.words}\n{note}")


@dataclass(frozen=True)
class BadRow:
    """A row that was not written.

    Attributes:
        key: the columns that identify it, as JSON.
        fault: what is wrong with it.
        row: the row as it was, as JSON.
        interval: in which it counts, as the column `INTERVAL` has it.
    """

    key: str
    fault: Fault
    row: str
    interval: int | None = None


@dataclass(frozen=True)
class SortedRows:
    """Rows that can be sent, some of them repaired (a mask); the same rows as they were; and those that cannot be sent. And
    how many values were repaired, by column.
    """

    good: pl.DataFrame
    as_they_were: pl.DataFrame
    repaired: pl.Series
    bad: list[BadRow]
    repaired_values: Counter[str] = field(default_factory=Counter)


def sort_out(frame: pl.DataFrame, table: DestinationTable, on_bad_rows: OnBadRows) -> SortedRows:
    """Repair what can be, and part the rows that can be sent from those that cannot.

    Args:
        frame: rows with the model's columns, and those beside them.
        table: the destination, whose columns must hold the values.
        on_bad_rows: with `repair` a repaired row is good, with `reject` and `fail` it is bad.
    """
    as_they_were = frame
    frame = frame.drop(AS_READ, strict=False)
    faults: dict[int, Fault] = {**_too_long_keys(frame, table)}
    repaired: set[int] = set()
    repaired_values: Counter[str] = Counter()
    originals = as_read.originals(as_they_were)
    for source, destination in table.pairs:
        values = frame[source.name]
        unread = [row for row, original in originals.items() if source.name in original]
        mended = _mended(values, source, destination)
        if source.kind is Kind.INTEGER:
            faults = {row: _too_great(source, originals[row][source.name]) for row in unread} | faults
        elif on_bad_rows == "repair" and not (table.model.merge and source.name in table.model.key):
            values = _with(values, mended) if mended else values
            frame = frame.with_columns(values) if mended else frame
            repaired.update(mended, unread)
            repaired_values[source.name] += len({*mended, *unread})
        else:
            cannot = f"which {destination.declared} cannot hold."
            no_utf8 = Fault(source.name, f"Column {source.name} holds a text that is no UTF-8, {cannot}")
            no_text = Fault(source.name, f"Column {source.name} holds a NUL or half a surrogate pair, {cannot}")
            faults = dict.fromkeys(mended, no_text) | dict.fromkeys(unread, no_utf8) | faults
        past = types.past_range(values, destination)
        if past.any():
            rows = zip(past.arg_true(), _plain(values.filter(past)), strict=True)
            faults = {row: _past_range(source, destination, time) for row, time in rows} | faults
        for misfits, remedy in types.misfits(values, source, destination, table.model):
            if misfits.any():
                fault = Fault(source.name, _reason(source, destination, table, remedy))
                faults = dict.fromkeys(misfits.arg_true(), fault) | faults
    is_repaired = mask(repaired, frame.height)
    if not faults:
        return SortedRows(frame, as_they_were, is_repaired, [], +repaired_values)
    is_good = ~mask(faults, frame.height)
    bad = bad_rows(as_they_were, faults, table.model)
    return SortedRows(
        frame.filter(is_good), as_they_were.filter(is_good), is_repaired.filter(is_good), bad, +repaired_values
    )


def mask(rows: Collection[int], height: int) -> pl.Series:
    """True for these rows of so many."""
    return pl.repeat(False, height, eager=True).scatter(list(rows), True)


def _too_great(source: Column, number: object) -> Fault:
    def said(what: object) -> str:
        return (
            f"Column {source.name} holds {what}, which is no whole number of 64 bits: exports carry -9223372036854775808 to "
            "9223372036854775807. Correct the row in ClickHouse, and run the interval again."
        )

    return Fault(source.name, said("a number"), said(number))


def _past_range(source: Column, destination: DestinationColumn, time: object) -> Fault:
    first, last = types.range_text(destination)

    def said(what: object) -> str:
        return (
            f"Column {source.name} holds {what}, which {destination.declared} cannot hold: it has {first} to {last}. Correct "
            "the row in ClickHouse, and run the interval again."
        )

    return Fault(source.name, said("a time"), said(time))


def _with(values: pl.Series, mended: Mapping[int, str | list[str | None]]) -> pl.Series:
    """The values with those that were mended in their places."""
    new = pl.Series(values.name, list(mended.values()), dtype=values.dtype)
    if values.dtype == pl.String:
        return values.scatter(list(mended), new)
    # Lists cannot be scattered.
    places = pl.Series([*range(len(values)), *mended], dtype=pl.UInt32)
    joined = pl.DataFrame({"place": places, "value": pl.concat([values, new])})
    return joined.unique("place", keep="last").sort("place")["value"].alias(values.name)


def _reason(source: Column, destination: DestinationColumn, table: DestinationTable, remedy: str | None) -> str:
    if remedy is None:
        return f"Column {source.name} of {table.qualified} is in the key by which rows are merged, and cannot be NULL."
    not_null = " NOT NULL" if destination.not_null else ""
    return (
        f"Column {source.name} of {table.qualified} is {destination.declared}{not_null} and cannot hold the value as it "
        f"is. Run as the table's owner: ALTER TABLE {table.qualified} ALTER COLUMN {quoted(source.name)} {remedy};"
    )


def bad_rows(frame: pl.DataFrame, faults: Mapping[int, Fault], model: Model) -> list[BadRow]:
    r"""Rows of a frame as bad ones, by row with what is wrong. A byte that is no UTF-8 is \udcXX."""
    found = sorted(faults)
    rows = frame[found]
    intervals = rows[INTERVAL].to_list() if INTERVAL in rows.columns else [None] * len(found)
    bad = []
    for place, interval, row in zip(
        found, intervals, _values(rows.drop(IDENTITY, STATE, INTERVAL, strict=False)), strict=True
    ):
        fault, text = faults[place], _json(row)
        if len(text) > ROW_BYTES:
            text = _json(
                {name: value[:KEPT_CHARACTERS] if isinstance(value, str) else value for name, value in row.items()}
            )
            fault = fault.with_note(
                f"The row is too great to be kept: of each text the first {KEPT_CHARACTERS} characters are."
            )
        bad.append(BadRow(_json({name: row[name] for name in model.key}), fault, text, interval))
    return bad


def keys(frame: pl.DataFrame, model: Model) -> Iterator[str]:
    """The key of each row, as a `BadRow` has it."""
    beside = [AS_READ] if AS_READ in frame.columns else []
    for row in _values(frame.select(*model.key, *beside)):
        yield _json({name: row[name] for name in model.key})


def _values(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """The rows as they were, in values that JSON has. The frame may have `AS_READ`."""
    originals = as_read.originals(frame)
    columns = frame.drop(AS_READ, strict=False)
    for place, values in enumerate(zip(*map(_plain, columns.iter_columns()), strict=True)):
        yield dict(zip(columns.columns, values, strict=True)) | originals.get(place, {})


def _plain(values: pl.Series) -> Sequence[object]:
    """The values as Python has them, or as texts: Python has no times outside the years 1 to 9999, JSON no NaN."""
    if values.dtype.is_temporal():
        shown = types.date_text if values.dtype == pl.Date else types.time_text
        return [None if value is None else shown(value) for value in values.to_physical()]
    if values.dtype.is_float():
        return [value if value is None or math.isfinite(value) else _NOT_FINITE[str(value)] for value in values]
    return values.to_list()


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""Numbers that JSON has not, as Postgres writes them."""


def _json(values: Mapping[str, object]) -> str:
    return json.dumps(values, allow_nan=False)


def repaired_json(text: str) -> str:
    """A JSON text in which every NUL and lone surrogate, raw or escaped, is U+FFFD; else the same to the letter."""
    return _ESCAPE.sub(_repaired_escape, text.replace("\0", REPLACEMENT))


def _repaired_escape(escape: re.Match[str]) -> str:
    code = escape["code"]
    if code is None or not (code == "0000" or 0xD800 <= int(code, 16) <= 0xDFFF):
        return escape.group()
    return "\\ufffd"


def _too_long_keys(frame: pl.DataFrame, table: DestinationTable) -> dict[int, Fault]:
    """Rows of a merge whose key is longer than the primary key's index can hold."""
    texts = [name for name in table.model.key if frame.schema[name] == pl.String]
    if not (table.model.merge and texts):
        return {}
    size = frame.select(pl.sum_horizontal(pl.col(name).str.len_bytes() for name in texts)).to_series()
    reason = f"The key is longer than {KEY_BYTES} bytes, more than an index of Postgres holds."
    return dict.fromkeys((size > KEY_BYTES).arg_true(), Fault(texts[0], reason))


def _json_suspects(values: pl.Series) -> pl.Series:
    """The rows whose document may hold a NUL or half a surrogate pair."""
    rows = values.str.contains_any(_SUSPICIOUS).arg_true()
    # Emoji are whole pairs in most of them; not if an escaped backslash stands before what looks like one.
    documents = values.gather(rows)
    without_pairs = documents.str.replace_all(_PAIR, "?").str.contains_any(_SUSPICIOUS)
    return rows.filter(without_pairs | documents.str.contains(_ESCAPED_BACKSLASH, literal=True))


def _mended(values: pl.Series, source: Column, destination: DestinationColumn) -> dict[int, str | list[str | None]]:
    """The new value of each row whose text holds what Postgres cannot."""
    if source.kind is Kind.TEXT_LIST:
        with_nul = values.list.eval(pl.element().str.contains("\0", literal=True)).list.any().arg_true()
        lists: list[list[str | None]] = values.gather(with_nul).to_list()
        mended_lists = [[text and text.replace("\0", REPLACEMENT) for text in texts] for texts in lists]
        return dict(zip(with_nul, mended_lists, strict=True))
    if source.kind not in (Kind.TEXT, Kind.JSON):
        return {}
    # Only JSONB reads escapes; TEXT and JSON keep them as they are written.
    as_jsonb = source.kind is Kind.JSON and destination.type == "jsonb"
    suspects = _json_suspects(values) if as_jsonb else values.str.contains_any(["\0"]).arg_true()
    mended: dict[int, str | list[str | None]] = {}
    for row, value in zip(suspects, values.gather(suspects), strict=True):
        new = repaired_json(value) if as_jsonb else value.replace("\0", REPLACEMENT)
        if new != value:
            mended[row] = new
    return mended
