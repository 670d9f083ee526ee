"""A model of the user's own: a ClickHouse query for one interval, with the columns that it gives."""

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import md5
from typing import Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from pg_exports.models.columns import check_name, declared_type, exact_value, value
from pg_exports.models.model import (
    IDENTITY,
    INTERVAL,
    MORE_COLUMNS,
    STATE,
    Column,
    Kind,
    Merge,
    Model,
    Query,
    Selection,
    backquoted,
    fingerprints,
)

# What is not looked into for placeholders and semicolons: texts, quoted names, comments.
_QUOTED_OR_COMMENT = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`(?:[^`\\]|\\.)*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|#[ !][^\n]*|/\*.*?\*/",
    re.DOTALL,
)
_PLACEHOLDER = re.compile(r"\{\s*(?P<name>[A-Za-z_]\w*)\s*(?::(?P<type>[^{}]*))?\}")

_PLACEHOLDERS = {
    "interval_start": "{interval_start:DateTime64(6, 'UTC')}",
    "interval_end": "{interval_end:DateTime64(6, 'UTC')}",
    "team_id": "{team_id:Int64}",
}
"""What a query may have bound, and how it is written for ClickHouse."""

_BOUND_TYPES = {"interval_start": "DateTime", "interval_end": "DateTime", "team_id": "Int"}

_TEXTS = 2
"""Version of the texts that identities are made of. In version 1 they followed the user's profile, for example
`date_time_output_format`."""

_NORMAL_TEXTS: Mapping[str, int] = {"UUID": 3, "DOUBLE PRECISION": 3}
"""The same for keys of these types. In version 2 a UUID in capitals was another one, and -0 was another number than 0."""

_STATES = 1
"""Version of the hashes that states are."""

_START = f"toUnixTimestamp64Micro({_PLACEHOLDERS['interval_start']})"


class OwnModel(BaseModel):
    """A ClickHouse query as a model.

    Attributes:
        name: letters, digits and underscores.
        query: a SELECT that gives the columns for one interval, with `{interval_start}` and `{interval_end}` in it (each
            a DateTime64(6, 'UTC')), and `{team_id}` where it is needed.
        columns: the Postgres type of each column that is exported, by name; the types are those of an `AddedColumn`.
        key: the columns that identify a row. Of an interval's rows with one key one is exported; without a `version` any.
        version: with it rows are merged: that with the greater version replaces the one that is there, and is the one that
            an interval exports. Compared in order, with NULL lowest. Without it rows are appended. A value in `key` or
            `version` that the column's type cannot hold exactly ends the run.
        description: what its rows are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    query: str
    columns: dict[str, str]
    key: list[str]
    version: list[str] = []
    description: str = ""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch("[A-Za-z0-9_]+", name):
            raise ValueError("`name` must be letters, digits and underscores")
        return name

    @field_validator("query")
    @classmethod
    def _check_query(cls, query: str) -> str:
        bare = _bare(query)
        if ";" in bare:
            raise ValueError("`query` must be one statement")
        found = [(placeholder["name"], placeholder["type"]) for placeholder in _PLACEHOLDER.finditer(bare)]
        for name, type_ in found:
            if name not in _PLACEHOLDERS:
                raise ValueError(f"`query` has a placeholder {{{name}}}, and there are only {_listed(_PLACEHOLDERS)}")
            if type_ is not None and _BOUND_TYPES[name] not in type_:
                raise ValueError(f"`query` must have {{{name}}} without a type, or as {_PLACEHOLDERS[name]}")
        missing = [name for name in ("interval_start", "interval_end") if name not in dict(found)]
        if missing:
            raise ValueError(
                f"`query` must name {_listed(missing)}, between which it selects: an export reads one interval at a time"
            )
        return query

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        if not columns:
            raise ValueError("`columns` must have at least one column with its Postgres type")
        for name in columns:
            check_name(name)
        return {name: declared_type(type_)[0] for name, type_ in columns.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.key:
            raise ValueError("`key` must have at least one column")
        for attribute, names in (("key", self.key), ("version", self.version)):
            for name in names:
                if name not in self.columns:
                    raise ValueError(f"`{attribute}` has `{name}`, which is not among the `columns`")
                if declared_type(self.columns[name])[1] in (Kind.JSON, Kind.TEXT_LIST):
                    raise ValueError(f"`{attribute}` has `{name}`, and {self.columns[name]} cannot be compared")
        if len({*self.key, *self.version}) < len(self.key) + len(self.version):
            raise ValueError("a column may be in `key` and `version` once")
        return self

    def as_model(self) -> Model:
        """The model. Its query and its fingerprints are for one interval each."""
        columns = tuple(_columns(self.columns))
        times = [column.name for column in columns if column.kind is Kind.TIMESTAMP]
        return Model(
            name=self.name,
            description=self.description or f"What the query {self.name} gives for the interval.",
            columns=columns,
            key=tuple(self.key),
            merge=Merge(version=tuple(self.version)) if self.version else None,
            query=self._query,
            fingerprints=self._fingerprints,
            timestamps=(times[0], times[0]) if times else None,
            one_interval_a_query=True,
            has_teams=any(found["name"] == "team_id" for found in _PLACEHOLDER.finditer(_bare(self.query))),
            key_may_be_null=True,
            identity_scheme=self._identity_scheme(),
            state_scheme=_digest([_STATES, *self.columns.items()]),
        )

    def _identity_scheme(self) -> str:
        """The hash of a row is made of the key's values as texts, so of their types too."""
        version = max(_NORMAL_TEXTS.get(self.columns[name], _TEXTS) for name in self.key)
        return _digest([version, *((name, self.columns[name]) for name in self.key)])

    def _query(self, selection: Selection) -> Query:
        # Of equal versions always the same row: another would look like a change. Rows that are appended are not sorted for
        # that: of a million of 0.8 KB ClickHouse would hold 1.9 GB, and send the first when it has the last.
        latest = ", ".join([*(f"{backquoted(name)} DESC NULLS LAST" for name in self.version), STATE])
        order = f"ORDER BY {latest}\n" if self.version else ""
        part = selection.part.condition(self._hash())
        where = f"WHERE 1{part}\n" if part else ""
        return _bound(f"{self._rows()}{where}{order}LIMIT 1 BY {_names(self.key)}\n", selection)

    def _fingerprints(self, selection: Selection) -> Query:
        if self.version:
            return Query(fingerprints(self._query(selection).sql), selection.parameters)
        # Of different rows with one key, which a run exports any of, always the same one counts.
        rows = f"SELECT {INTERVAL}, min({STATE}) AS {STATE}\nFROM ({self._rows()})\nGROUP BY {INTERVAL}, {IDENTITY}"
        return _bound(fingerprints(rows), selection)

    def _rows(self) -> str:
        """The query's rows, with the columns' own types, `IDENTITY`, `STATE` and `INTERVAL`."""
        values = ",\n".join(
            f"        {self._value(column)} AS {backquoted(column.name)}" for column in _columns(self.columns)
        )
        state = ", ".join(_hashed(column) for column in _columns(self.columns))
        return f"""
SELECT
    *,
    {self._hash()} AS {IDENTITY},
    cityHash64({IDENTITY}, {state}) AS {STATE},
    {_START} AS {INTERVAL}
FROM (
    SELECT
{values} {MORE_COLUMNS}
    FROM (
{_with_types(self.query)}
    ) AS own
)
"""

    def _value(self, column: Column) -> str:
        written = f"own.{backquoted(column.name)}"
        if column.name in (*self.key, *self.version):
            return exact_value(column.postgres_type, written, column.name)
        return value(column.kind, written, column.name)

    def _hash(self) -> str:
        # A tuple's text tells NULL from an empty text, which a hash of its values does not in every version.
        return f"cityHash64(toString(tuple({_names(self.key)})))"


def _columns(types: dict[str, str]) -> Iterator[Column]:
    for name, type_ in types.items():
        canonical, kind = declared_type(type_)
        yield Column(name, kind, canonical)


def _hashed(column: Column) -> str:
    """What a hash takes of a column's value. It would be NULL with one argument that is."""
    name = backquoted(column.name)
    other = {Kind.DATE: "toDate32(0)", Kind.TIMESTAMP: "toDateTime64(0, 6, 'UTC')", Kind.BOOLEAN: "false"}
    if column.kind is Kind.TEXT_LIST:
        return f"toString({name})"
    if column.kind in (Kind.TEXT, Kind.JSON):
        return f"isNull({name}), ifNull({name}, '')"
    return f"isNull({name}), ifNull({name}, {other.get(column.kind, '0')})"


def _digest(scheme: list[object]) -> str:
    return md5(repr(scheme).encode(), usedforsecurity=False).hexdigest()[:8]


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(backquoted, columns))


def _bound(sql: str, selection: Selection) -> Query:
    assert len(selection.starts) < 2, "a query of the user's own reads one interval"
    return Query(sql, selection.parameters)


def _bare(query: str) -> str:
    """The query to its last word, with all that is quoted or a comment blotted out, each character where it was."""

    def blot(found: re.Match[str]) -> str:
        return ("x" if found[0][0] in "'\"`$" else " ") * len(found[0])

    return _QUOTED_OR_COMMENT.sub(blot, query).rstrip("; \t\r\n")


def _with_types(query: str) -> str:
    """The query with each placeholder as ClickHouse has it, without semicolon and comment at its end."""
    written, end = [], 0
    bare = _bare(query)
    for found in _PLACEHOLDER.finditer(bare):
        written += [query[end : found.start()], _PLACEHOLDERS[found["name"]]]
        end = found.end()
    return "".join([*written, query[end : len(bare)]])


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)
