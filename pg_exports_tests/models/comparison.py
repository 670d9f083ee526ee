"""Comparing what landed with what should have: JSON as JSON, numbers digit for digit, times as instants in UTC."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeAlias

from pg_exports_tests.conftest import Target

Row: TypeAlias = tuple[Hashable, ...]


JSON_NULL = ("null",)


def exact(document: str | None) -> Hashable:
    """A JSON document as a value that equals another only if both say the same; of a double key the last counts. NULL is
    None, the document `null` is JSON_NULL.

    1e3 is 1000 and -0 is 0, as JSONB has them; but 1.50 is not 1.5, true is not 1, and no digit is lost.
    """
    if document is None:
        return None
    return frozen(json.loads(document, parse_int=_number, parse_float=_number, object_pairs_hook=_object))


def frozen(value: Any) -> Hashable:
    """A parsed JSON value without lists, so that it can be counted; null is told from NULL, true from a number."""
    if value is None:
        return JSON_NULL
    if isinstance(value, list):
        return ("array", *(frozen(item) for item in value))
    if isinstance(value, bool):
        return ("boolean", value)
    result: Hashable = value
    return result


def _number(digits: str) -> tuple[str, str]:
    plain = f"{Decimal(digits):f}"
    return "number", plain if Decimal(digits) else plain.removeprefix("-")


def _object(members: list[tuple[str, Any]]) -> tuple[str, frozenset[tuple[str, Hashable]]]:
    return "object", frozenset((key, frozen(value)) for key, value in dict(members).items())


def instant(moment: datetime | None) -> datetime | None:
    """A time in UTC; ClickHouse's client gives times in UTC without saying so."""
    if moment is None:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def differences(landed: Iterable[Row], expected: Iterable[Row]) -> dict[str, Sequence[tuple[Row, int]]]:
    """The first rows that are too many and that are missing, each with how often. Empty where the multisets are equal."""
    there, wanted = Counter(iter(landed)), Counter(iter(expected))
    found = {"too many": list((there - wanted).items())[:3], "missing": list((wanted - there).items())[:3]}
    return {what: rows for what, rows in found.items() if rows}


def landed_rows(target: Target, table: str, columns: Mapping[str, str]) -> list[Row]:
    """The rows in Postgres, as `comparable` makes them. `columns` are names and Postgres types."""
    names = ", ".join(f'"{name}"' for name in columns)
    return [comparable(row, columns) for row in target.rows(f'SELECT {names} FROM "{table}"')]


def comparable(row: Sequence[Any], columns: Mapping[str, str]) -> Row:
    """A row's values, each as its column's type says."""
    return tuple(_comparable(value, kind) for value, kind in zip(row, columns.values(), strict=True))


def _comparable(value: Any, kind: str) -> Hashable:
    if value is None:
        return None
    if kind == "JSONB":
        return exact(value)
    if kind.startswith("TIMESTAMP"):
        return instant(value)
    result: Hashable = tuple(value) if kind == "TEXT[]" else value
    return result


def created_columns(target: Target, table: str) -> dict[str, str]:
    """Names and types of a table's columns, in its order, as a CREATE TABLE would spell them."""
    rows = target.rows(
        f"""
        SELECT a.attname, upper(format_type(a.atttypid, a.atttypmod))
        FROM pg_attribute AS a
        WHERE a.attrelid = '"{table}"'::regclass AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY a.attnum
        """
    )
    return {name: kind.replace("CHARACTER VARYING", "VARCHAR") for name, kind in rows}
