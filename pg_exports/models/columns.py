"""Changes to a model's columns: some left out, some renamed, and some added, which are ClickHouse expressions.

Here too is what a column that a user declares may have as its Postgres type, and how ClickHouse gives its values then.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, field_validator

from pg_exports.models.model import BESIDE, MORE_COLUMNS, Column, Kind, Model, Query, Selection, backquoted, quoted

NAME_BYTES = 63
"""Postgres cuts longer names."""

TYPES: Mapping[str, Kind] = {
    "TEXT": Kind.TEXT,
    "VARCHAR": Kind.TEXT,
    "CHAR": Kind.TEXT,
    "UUID": Kind.TEXT,
    "JSONB": Kind.JSON,
    "JSON": Kind.JSON,
    "SMALLINT": Kind.INTEGER,
    "INTEGER": Kind.INTEGER,
    "BIGINT": Kind.INTEGER,
    "DOUBLE PRECISION": Kind.FLOAT,
    "BOOLEAN": Kind.BOOLEAN,
    "DATE": Kind.DATE,
    "TIMESTAMP WITH TIME ZONE": Kind.TIMESTAMP,
    "TIMESTAMP": Kind.TIMESTAMP,
    "TEXT[]": Kind.TEXT_LIST,
}
"""The Postgres types that a user may give a column, and the kind of its values. VARCHAR and CHAR may have a length."""

_SPELLINGS: Mapping[str, str] = {
    "CHARACTER VARYING": "VARCHAR",
    "CHARACTER": "CHAR",
    "BPCHAR": "CHAR",
    "INT2": "SMALLINT",
    "INT": "INTEGER",
    "INT4": "INTEGER",
    "INT8": "BIGINT",
    "FLOAT8": "DOUBLE PRECISION",
    "BOOL": "BOOLEAN",
    "TIMESTAMPTZ": "TIMESTAMP WITH TIME ZONE",
    "TIMESTAMP WITHOUT TIME ZONE": "TIMESTAMP",
}

_TYPE = re.compile(r"(?P<name>[A-Z0-9 ]+?(?: ?\[ ?\])?) ?(?:\( ?(?P<length>[1-9][0-9]{0,6}) ?\))?")
_WITH_LENGTH = ("VARCHAR", "CHAR")


def declared_type(type_: str) -> tuple[str, Kind]:
    """A Postgres type in its canonical spelling, and the kind of values that a column of it gets.

    Raises:
        ValueError: exports do not write such a type.
    """
    found = _TYPE.fullmatch(" ".join(type_.upper().split()))
    name = re.sub(r" ?\[ ?\]", "[]", found["name"]) if found else ""
    name = _SPELLINGS.get(name, name)
    length = found["length"] if found else None
    if name not in TYPES or (length and name not in _WITH_LENGTH):
        known = ", ".join(f"{known} or {known}(n)" if known in _WITH_LENGTH else known for known in TYPES)
        raise ValueError(f"a column's type must be one of {known}, not {type_!r}")
    return (f"{name}({length})" if length else name), TYPES[name]


def value(kind: Kind, column: str, name: str) -> str:
    """The ClickHouse expression that gives a column's values as those of a kind.

    NULL stays NULL. An empty text is NULL, too, but for kinds of text. What is no value of the kind is an error of
    ClickHouse's: no value is guessed, cut or wrapped.

    Args:
        kind: of the values.
        column: the column, of any ClickHouse type, as SQL.
        name: of the column, for the error.
    """
    text = f"nullIf(toString({column}), '')"
    match kind:
        case Kind.TEXT:
            return f"toString({column})"
        case Kind.JSON:
            return f"multiIf({_is_text(column)}, {text}, isNull({column}), NULL, toJSONString({column}))"
        case Kind.INTEGER:
            # By its text, as accurateCast cuts a decimal's fraction off.
            number = f"accurateCastOrNull({text}, 'Int64')"
            is_none = f"isNull({number}) AND isNotNull({text})"
            return _checked(number, "0", is_none, name, "no whole number of 64 bits")
        case Kind.FLOAT:
            number = f"CAST({column} AS Nullable(Float64))"
            return _checked(number, "0.", f"isNull({number}) AND isNotNull({text})", name, "no number")
        case Kind.BOOLEAN:
            return f"CAST({text} AS Nullable(Bool))"
        case Kind.DATE:
            # A text that is no date would become NULL, or 1900-01-01.
            date = f"CAST({column} AS Nullable(Date32))"
            is_none = f"isNotNull({text}) AND toString({date}) IS DISTINCT FROM left({text}, 10)"
            is_none = f"{_is_text(column)} AND {is_none}"
            date = _checked(date, "toDate32(0)", is_none, name, "no date like 2026-11-20")
            micros = f"toUnixTimestamp64Micro(toDateTime64({column}, 6, 'UTC'))"
            return _within(date, column, "DateTime64", micros, 10**6, name)
        case Kind.TIMESTAMP:
            # What is missing of a text would be taken from the clock: '5' would be a day of this year.
            parsed = f"parseDateTime64BestEffortOrNull({text}, 6, 'UTC')"
            time = f"if({_is_text(column)}, {parsed}, toDateTime64({column}, 6, 'UTC'))"
            is_none = f"isNotNull({text}) AND (isNull({parsed}) OR NOT match({text}, '[0-9]{{4}}'))"
            is_none = f"{_is_text(column)} AND {is_none}"
            no_time = "no time with its year, like 2026-11-20 13:00:00"
            time = _checked(time, "toDateTime64(0, 6, 'UTC')", is_none, name, no_time)
            return _within(time, column, "U?Int|Float|Decimal", f"toFloat64({column})", 1, name)
        case Kind.TEXT_LIST:
            return f"CAST({column} AS Array(Nullable(String)))"


_FIRST_SECOND, _END_SECOND = -62_167_219_200, 253_402_300_800
"""The years 0 to 9999, in seconds since 1970. Of other times ClickHouse makes the nearest one of these where it converts."""


def _within(value: str, column: str, types: str, number: str, a_second: int, name: str) -> str:
    """A date or time. An error if the column has one of the types (a pattern) and its number is outside the years; a second
    is `a_second` in it.
    """
    message = quoted(
        f"Column {name} holds a time outside the years 0 to 9999, which this conversion would change. Numbers are seconds: "
        "for milliseconds have the query use fromUnixTimestamp64Milli"
    )
    # Constant for ClickHouse, so that the number is computed for these types alone.
    is_one = f"match(toTypeName({column}), '^(Nullable[(])?({types})')"
    is_outside = f"{number} < {_FIRST_SECOND * a_second} OR {number} >= {_END_SECOND * a_second}"
    outside = f"if({is_one}, ifNull({is_outside}, 0), 0)"
    return f"{value} + throwIf({outside}, {message})"


def exact_value(type_: str, column: str, name: str) -> str:
    """The same for a column by which rows are told apart: two different values of the source never become one.

    Equal are the values that are one value in every spelling: UUIDs in capitals, one moment in two time zones, 0 and -0.

    Args:
        type_: the column's Postgres type.
        column: the column, of any ClickHouse type, as SQL.
        name: of the column, for the error.
    """
    canonical, kind = declared_type(type_)
    result = value(kind, column, name)
    text = f"nullIf(toString({column}), '')"
    back = f"CAST({result}, replaceOne(toTypeName({column}), 'Nothing', 'String'))"
    # In the hour that a change of clocks repeats, the text of a time with a zone is that of two moments.
    is_time = f"startsWith({_PLAIN_TYPE.format(column)}, 'DateTime')"
    time_or_text = f"if({is_time}, toTypeName({column}), 'Nullable(String)')"
    is_lost = {
        Kind.TEXT: f"{is_time} AND CAST(toString({column}), {time_or_text}) != CAST({column}, {time_or_text})",
        Kind.INTEGER: f"toString({result}) != {text}",
        Kind.FLOAT: f"NOT startsWith({_PLAIN_TYPE.format(column)}, 'Float') AND toString({result}) != {text}",
        Kind.BOOLEAN: f"{_is_text(column)} AND {text} NOT IN ('true', 'false')",
        Kind.DATE: f"if({_is_text(column)}, toString({result}) != {text}, {back} != {column})",
        # Of a text the digits past microseconds are seen; it cannot be held against the time's own text.
        Kind.TIMESTAMP: f"if({_is_text(column)}, match({text}, '[.,][0-9]{{6}}[0-9]*[1-9]'), {back} != {column})",
    }[kind]
    # '' would be NULL.
    conditions = [is_lost] if kind is Kind.TEXT else [is_lost, f"toString({column}) = ''"]
    if canonical.startswith("CHAR"):
        conditions.append(f"endsWith(toString({column}), ' ')")
    is_refused = " OR ".join(f"ifNull({condition}, 0)" for condition in conditions)
    before = f'Column {name}, {TOLD_APART}, holds "'
    after = (
        f'", which {canonical} cannot hold as it is: different rows would become one. Give the column another type, or round '
        "the value in the query."
    )
    message = f"concat({quoted(before)}, ifNull(toString({column}), ''), {quoted(after)})"
    normal = {"UUID": f"lower({result})", "DOUBLE PRECISION": f"{result} + 0"}.get(canonical, result)
    # An exception has no text but a constant one, unless it is of a text that is no number. NULL, so that nothing is folded.
    return f"if(CAST(if({is_refused}, {message}, '0') AS UInt8), NULL, {normal})"


TOLD_APART = "by which rows are told apart"
"""Stands in the errors of `exact_value`."""

_PLAIN_TYPE = "replaceRegexpOne(toTypeName({}), '^(LowCardinality\\\\()?(Nullable\\\\()?', '')"
"""The name of a column's type, but for a bracket at its end. A constant for ClickHouse."""


def _is_text(column: str) -> str:
    """Whether a column is of texts: a constant for ClickHouse, so that one branch alone is computed."""
    return f"toTypeName({column}) IN ('String', {_TEXT_TYPES})"


_TEXT_TYPES = "'Nullable(String)', 'LowCardinality(String)', 'LowCardinality(Nullable(String))'"


def _checked(result: str, other: str, is_none: str, name: str, otherwise: str) -> str:
    """A value; an error where a condition says that there is none. Any `other` value of the type keeps ClickHouse from
    folding the two branches where both are NULL, and the error with them.
    """
    message = quoted(f"Column {name} holds a value that is {otherwise}")
    return f"if(throwIf(ifNull({is_none}, 0), {message}), {other}, {result})"


def check_name(name: str) -> None:
    """Make sure that a column may be called so.

    Raises:
        ValueError: it is empty, too long for Postgres, or a name that exports need for themselves.
    """
    if not name or "\0" in name or len(name.encode()) > NAME_BYTES:
        raise ValueError(f"a column's name must be 1 to {NAME_BYTES} bytes long: {name!r} is not")
    if name in BESIDE:
        raise ValueError(f"no column may be called {', '.join(BESIDE)}: exports need these names for themselves")


class AddedColumn(BaseModel):
    """A column that the model does not have.

    Attributes:
        expression: ClickHouse SQL over the model's source, such as `JSONExtractString(properties, 'plan')`.
        type: its Postgres type: TEXT, VARCHAR(n), CHAR(n), UUID, JSONB, JSON, SMALLINT, INTEGER, BIGINT, DOUBLE PRECISION,
            BOOLEAN, DATE, TIMESTAMP WITH TIME ZONE, TIMESTAMP or TEXT[].
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    expression: str
    type: str

    @field_validator("expression")
    @classmethod
    def _check_expression(cls, expression: str) -> str:
        if not expression.strip():
            raise ValueError("`expression` must be a ClickHouse expression")
        return expression.strip()

    @field_validator("type")
    @classmethod
    def _check_type(cls, type_: str) -> str:
        return declared_type(type_)[0]


ColumnChange = bool | str | AddedColumn
"""False leaves a column out; True creates an optional one with the table; a text is the column's name in Postgres (an optional
one is created then, too); an `AddedColumn` adds one."""


def with_columns(model: Model, changes: Mapping[str, ColumnChange]) -> Model:
    """The model with other columns, the added ones last.

    What is left out is neither created nor read. Expressions have the model's own names, whatever a column is renamed to.

    Args:
        model: the model.
        changes: by the model's name of a column, or by the name of one to add.

    Raises:
        ValueError: there is no such column, or the model cannot do without it, or a name is not possible or given twice.
    """
    if not changes:
        return model
    added = [_added(model, name, change) for name, change in changes.items() if isinstance(change, AddedColumn)]
    _check_changes(model, changes)
    kept = [column for column in model.columns if changes.get(column.name) is not False]
    names = {column.name: _new_name(column, changes) for column in kept}
    columns = (*(_changed(column, names[column.name], changes) for column in kept), *added)
    for name, times in Counter(column.name for column in columns).items():
        check_name(name)
        if times > 1:
            raise ValueError(f"two columns would be called `{name}`")
    read = _reader(added, _unread(model, kept))
    return replace(
        model,
        columns=columns,
        key=tuple(names[name] for name in model.key if name in names),
        left_out_of_key=tuple(name for name in model.key if name not in names),
        merge=replace(model.merge, version=tuple(names[name] for name in model.merge.version)) if model.merge else None,
        timestamps=_renamed(model.timestamps, names),
        query=read(model.query),
        without_dictionary=model.without_dictionary and _without_dictionary(model, model.without_dictionary, changes),
    )


def _without_dictionary(model: Model, without: Model, changes: Mapping[str, ColumnChange]) -> Model:
    """The changes that the model without its dictionary can have. A column added from one that needs it needs it, too."""
    lacking = {column.name for column in model.columns} - {column.name for column in without.columns}
    words = "|".join(map(re.escape, sorted(lacking)))
    possible = {
        name: change
        for name, change in changes.items()
        if name not in lacking
        and not (isinstance(change, AddedColumn) and re.search(rf"(?<!\w)({words})(?!\w)", change.expression))
    }
    return with_columns(without, possible)


def _check_changes(model: Model, changes: Mapping[str, ColumnChange]) -> None:
    names = [column.name for column in model.columns]
    needed = (*model.key, *model.merge.version) if model.merge else model.key[:1]
    for name, change in changes.items():
        if not isinstance(change, AddedColumn) and name not in names:
            raise ValueError(f"{model.name} has no column `{name}`: it has {', '.join(names)}")
        if change is False and name in needed:
            raise ValueError(
                f"`{name}` cannot be left out: by {', '.join(needed)} the rows of {model.name} are told apart"
            )
        if isinstance(change, str) and name == "team_id" and change != name:
            raise ValueError("`team_id` cannot be renamed")


def _added(model: Model, name: str, change: AddedColumn) -> Column:
    if name in {column.name for column in model.columns} | _needed_beside(model):
        raise ValueError(f"`{name}` is a column of {model.name}: an added one needs another name")
    type_, kind = declared_type(change.type)
    return Column(name, kind, type_, expression=change.expression)


def _needed_beside(model: Model) -> set[str]:
    return {name for names in model.needs.values() for name in names}


def _new_name(column: Column, changes: Mapping[str, ColumnChange]) -> str:
    change = changes.get(column.name)
    return change if isinstance(change, str) else column.name


def _changed(column: Column, name: str, changes: Mapping[str, ColumnChange]) -> Column:
    is_optional = column.optional and column.name not in changes
    return replace(column, name=name, optional=is_optional, alias=column.name_in_answer)


def _renamed(pair: tuple[str, str] | None, names: Mapping[str, str]) -> tuple[str, str] | None:
    return (names[pair[0]], names[pair[1]]) if pair and names.keys() >= {*pair} else None


def _unread(model: Model, kept: Iterable[Column]) -> list[str]:
    """The names in the model's answer that nobody needs any more."""
    wanted = {column.name_in_answer for column in kept}
    needed = wanted.union(*(model.needs.get(name, ()) for name in wanted))
    answered = {column.name_in_answer for column in model.columns} | _needed_beside(model)
    return sorted(answered - needed)


def _reader(
    added: Sequence[Column], unread: Sequence[str]
) -> Callable[[Callable[[Selection], Query]], Callable[[Selection], Query]]:
    """What makes of a model's query the one with the added columns, and without those that are not read."""
    return lambda query: lambda selection: _with(query(selection), added).without(unread)


def _with(query: Query, added: Sequence[Column]) -> Query:
    if not added:
        return query
    # On lines of their own: an expression may end with a comment.
    expressions = "".join(f",\n    (\n{column.expression}\n) AS {backquoted(column.name)}" for column in added)
    values = ",\n".join(
        f"    {value(column.kind, f'answer_rows.{backquoted(column.name)}', column.name)} AS {backquoted(column.name)}"
        for column in added
    )
    sql = query.sql.strip().replace(MORE_COLUMNS, f"{MORE_COLUMNS}{expressions}", 1)
    return Query(f"SELECT * REPLACE (\n{values}\n)\nFROM (\n{sql}\n) AS answer_rows", query.parameters)
