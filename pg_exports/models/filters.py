"""Filters on the properties of events and persons, as PostHog has them: their settings, and their ClickHouse conditions.

Values compare as text: a JSON string is its unescaped text, all else its JSON text (true, 10, 1.5). JSON's null is no value.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

Operator = Literal[
    "exact",
    "is_not",
    "icontains",
    "not_icontains",
    "regex",
    "not_regex",
    "gt",
    "gte",
    "lt",
    "lte",
    "is_set",
    "is_not_set",
]

FilterType = Literal["event", "person"]
"""Whose properties a filter looks at."""

Value = str | int | float | bool

_COMPARISONS: Mapping[str, str] = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_WITHOUT_VALUE = ("is_set", "is_not_set")


class PropertyFilter(BaseModel):
    """A condition on one property.

    Attributes:
        key: the property's name, as it is: dots and $ mean nothing.
        operator: `exact` and `is_not`; `icontains` and `not_icontains` (a part of the text, in upper or lower case; % and _
            mean themselves); `regex` and `not_regex` (RE2, found anywhere in the text); `gt`, `gte`, `lt` and `lte` (as
            64-bit floats; a text that is no finite number does not match); `is_set` and `is_not_set`.
        value: what to compare with; of a list, one must match (`is_not`, `not_icontains`, `not_regex`: none may). One
            number for gt, gte, lt and lte; nothing for `is_set` and `is_not_set`.
        type: `event` or `person` (as the person was when the event was received); None for the model's own.

    `is_not`, `not_icontains` and `not_regex` also hold without the property.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    key: str
    operator: Operator = "exact"
    value: Value | list[Value] | None = None
    type: FilterType | None = None

    @field_validator("value", mode="before")
    @classmethod
    def _check_value(cls, value: Any) -> Any:
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not all(isinstance(one, (str, int, float, bool)) for one in values):
            raise ValueError("`value` must be a text, a number or a boolean, or a list of them")
        if any(isinstance(one, float) and not math.isfinite(one) for one in values):
            raise ValueError("`value` must be a finite number")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.key:
            raise ValueError("`key` must be the name of a property")
        which = f"the filter on `{self.key}`"
        if self.operator in _WITHOUT_VALUE and self.value is not None:
            raise ValueError(f"`operator: {self.operator}` has no `value` ({which})")
        if self.operator not in _WITHOUT_VALUE and (self.value is None or self.value == []):
            raise ValueError(f"`value` is missing, with which to compare ({which})")
        if self.operator in _COMPARISONS and not _is_number(self.value):
            raise ValueError(f"`operator: {self.operator}` needs one number as `value` ({which})")
        return self

    @property
    def texts(self) -> list[str]:
        """The values as texts."""
        values = self.value if isinstance(self.value, list) else [] if self.value is None else [self.value]
        return [_as_text(value) for value in values]


@dataclass(frozen=True)
class Conditions:
    """ClickHouse conditions that must all hold, and the values that are bound in them."""

    sql: tuple[str, ...]
    parameters: dict[str, object]


def conditions(filters: Sequence[PropertyFilter], documents: Mapping[FilterType, str]) -> Conditions:
    """The conditions of some filters.

    Of a key that stands twice in a document the last one counts, as in JSONB. In a document that ClickHouse's JSON functions
    refuse (1e400, half a surrogate pair) the key is searched for as text, at any depth.

    Milliseconds a million rows of 0.9 KB: 130 where documents lack the key, 430 where they have it, 1,000 where it stands in
    them twice (in `$set`, too).

    Args:
        filters: all of them must hold.
        documents: the SQL of the properties' JSON text by filter type; a filter without a type looks at the first.

    Raises:
        KeyError: a filter's type has no document.
    """
    sql, parameters = [], dict[str, object]()
    own = next(iter(documents))
    for n, one in enumerate(filters):
        name = f"filter_{n}"
        document = documents[one.type or own]
        key = json.dumps(one.key, ensure_ascii=False)
        parameters[f"{name}_key"] = one.key
        parameters[f"{name}_in_json"] = key[1:-1]
        if one.operator in _COMPARISONS:
            parameters[f"{name}_value"] = repr(float(one.texts[0]))
        elif one.operator not in _WITHOUT_VALUE:
            parameters[f"{name}_values"] = one.texts
        sql.append(_CONDITIONS[one.operator](_text(document, name, one.key), name, len(one.texts)))
    return Conditions(tuple(sql), parameters)


def _text(document: str, name: str, key: str) -> str:
    """The property's value as text; NULL where it is not set."""
    quoted = f"""concat('"', {{{name}_in_json:String}}, '"')"""
    # What else a document may write the key with: \uXXXX, and for some characters a backslash and a letter.
    escape = "\\\\" if set(key) & set('"\\/') or min(key) < " " else "\\\\u"
    bound = f"{{{name}_key:String}}"
    raw = f"{name}_raw"
    return f"""if(
        isNull(
            multiIf(
                position({document}, {quoted}) = 0 AND position({document}, '{escape}') = 0,
                NULL,
                countSubstrings({document}, {quoted}) > 1,
                arrayLast(m -> m.1 = {bound}, JSONExtractKeysAndValues({document}, 'Nullable(String)')).2,
                JSONExtract({document}, {bound}, 'Nullable(String)')
            ) AS {name}_read
        )
            AND position({document}, {quoted}) > 0
            AND NOT isValidJSON({document}),
        multiIf(
            (trim(BOTH ' \\t\\r\\n' FROM simpleJSONExtractRaw({document}, {{{name}_in_json:String}})) AS {raw}) = '',
            NULL,
            isValidJSON({raw}),
            JSONExtract({raw}, 'Nullable(String)'),
            startsWith({raw}, '"'),
            substring({raw}, 2, length({raw}) - 2),
            {raw}
        ),
        {name}_read
    )"""


def _exact(text: str, name: str, values: int) -> str:
    return f"ifNull({text} IN {{{name}_values:Array(String)}}, 0)"


def _icontains(text: str, name: str, values: int) -> str:
    return _any(text, name, values, "positionCaseInsensitiveUTF8({text}, {value}) > 0")


def _regex(text: str, name: str, values: int) -> str:
    return _any(text, name, values, "match({text}, {value})")


def _any(text: str, name: str, values: int, condition: str) -> str:
    """Each value is a constant of its own: of an array ClickHouse would compile a regex again for each row."""
    each = (f"{{{name}_values:Array(String)}}[{n + 1}]" for n in range(values))
    matches = " OR ".join(condition.format(text=f"{name}_text", value=value) for value in each)
    return f"ifNull(isNotNull({text} AS {name}_text) AND ({matches}), 0)"


def _not(condition: Callable[[str, str, int], str]) -> Callable[[str, str, int], str]:
    return lambda text, name, values: f"NOT {condition(text, name, values)}"


def _compared(sign: str) -> Callable[[str, str, int], str]:
    def condition(text: str, name: str, values: int) -> str:
        number = f"{name}_number"
        return f"ifNull(isFinite(toFloat64OrNull({text}) AS {number}) AND {number} {sign} {{{name}_value:Float64}}, 0)"

    return condition


_CONDITIONS: Mapping[Operator, Callable[[str, str, int], str]] = {
    "exact": _exact,
    "is_not": _not(_exact),
    "icontains": _icontains,
    "not_icontains": _not(_icontains),
    "regex": _regex,
    "not_regex": _not(_regex),
    "gt": _compared(">"),
    "gte": _compared(">="),
    "lt": _compared("<"),
    "lte": _compared("<="),
    "is_set": lambda text, name, values: f"isNotNull({text})",
    "is_not_set": lambda text, name, values: f"isNull({text})",
}
"""The condition of each operator on a property's text, with the filter's name and the number of its values."""


def _as_text(value: Value) -> str:
    """A value as JSON would write it, a text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return json.dumps(value)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    try:
        return math.isfinite(float(value)) and "_" not in str(value)
    except (ValueError, OverflowError):
        return False
