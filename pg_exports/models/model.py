"""What a model is: its columns, how its rows meet those already in Postgres, and its ClickHouse query.

Nothing here talks to a database. The models themselves are the modules beside this one.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum, auto

import polars as pl

from pg_exports.models.filters import FilterType, PropertyFilter


class Kind(Enum):
    """What a column's values are, whatever the type that the destination has for them.

    `FRAME_TYPES` has the Polars type of each in a frame: JSON travels as its text, whole numbers of every width as 64-bit
    integers, times as microseconds in UTC.
    """

    TEXT = auto()
    JSON = auto()
    INTEGER = auto()
    FLOAT = auto()
    BOOLEAN = auto()
    DATE = auto()
    TIMESTAMP = auto()
    TEXT_LIST = auto()


FRAME_TYPES: Mapping[Kind, pl.DataType] = {
    Kind.TEXT: pl.String(),
    Kind.JSON: pl.String(),
    Kind.INTEGER: pl.Int64(),
    Kind.FLOAT: pl.Float64(),
    Kind.BOOLEAN: pl.Boolean(),
    Kind.DATE: pl.Date(),
    Kind.TIMESTAMP: pl.Datetime("us", "UTC"),
    Kind.TEXT_LIST: pl.List(pl.String()),
}
"""The Polars type of each kind of column in a frame."""

IDENTITY = "identity"
"""A column of frames beside the model's own: a 64-bit hash (UInt64) of what identifies a row."""

STATE = "row_state"
"""A column of frames beside the model's own: a 64-bit hash (UInt64) of what identifies a row and of its version. It changes
whenever the source has the row in another state."""

AS_READ = "as_read"
"""A column of frames beside the model's own, in those frames alone that need it: what a row's values were before they were
made to fit a frame, as a JSON object by column (String, NULL for the rows that fit)."""

INTERVAL = "interval_start"
"""A column of a query's answer beside the model's own (Int64): the beginning of the interval in which the row counts, in
microseconds since 1970."""

BESIDE = (IDENTITY, STATE, AS_READ, INTERVAL)
"""The columns of frames beside a model's own; none of its own may be called so."""

MORE_COLUMNS = "/* more columns */"
"""Stands in a model's query where its list of columns ends: `columns` puts the added ones there."""


@dataclass(frozen=True)
class Column:
    """One column of a model.

    Attributes:
        name: in Postgres, and in the frames.
        kind: what its values are.
        postgres_type: its type in a table that an export creates.
        optional: it is not created; it is filled where the destination has it.
        sources: the source columns that it is made from, as `table.column`.
        alias: its name in the query's answer, where that is another.
        expression: the ClickHouse expression of an added column. It is created, and read where the destination has it.
    """

    name: str
    kind: Kind
    postgres_type: str
    optional: bool = False
    sources: tuple[str, ...] = ()
    alias: str | None = None
    expression: str | None = None

    @property
    def name_in_answer(self) -> str:
        """Its name in the query's answer."""
        return self.alias or self.name


def varchar(name: str, *sources: str) -> Column:
    """A VARCHAR(200) column, PostHog's own width."""
    return Column(name, Kind.TEXT, "VARCHAR(200)", sources=sources)


def text(name: str, *sources: str, optional: bool = False) -> Column:
    """A TEXT column."""
    return Column(name, Kind.TEXT, "TEXT", optional, sources)


def jsonb(name: str, *sources: str, optional: bool = False) -> Column:
    """A JSONB column."""
    return Column(name, Kind.JSON, "JSONB", optional, sources)


def integer(name: str, *sources: str) -> Column:
    """An INTEGER column."""
    return Column(name, Kind.INTEGER, "INTEGER", sources=sources)


def bigint(name: str, *sources: str) -> Column:
    """A BIGINT column."""
    return Column(name, Kind.INTEGER, "BIGINT", sources=sources)


def timestamptz(name: str, *sources: str, optional: bool = False) -> Column:
    """A TIMESTAMP WITH TIME ZONE column."""
    return Column(name, Kind.TIMESTAMP, "TIMESTAMP WITH TIME ZONE", optional, sources)


@dataclass(frozen=True)
class Merge:
    """How a row replaces the one with the same primary key that Postgres holds.

    It does when its `version` columns, compared in order with NULL lowest, are greater; and when they are equal, any other
    column differs, and it was read later.
    """

    version: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One of the parts that the rows of an interval fall into, by a hash of what identifies them: `number` (from 0) of
    `count`. All parts together are all rows, each once.
    """

    number: int = 0
    count: int = 1

    def condition(self, hashed: str) -> str:
        """The ClickHouse condition that rows of this part fulfil; none where there is but one.

        Args:
            hashed: an expression of type UInt64. As a range of it, which a sorting key that has it can be searched by.
        """
        return f"\n    AND {hashed} BETWEEN {{part_first:UInt64}} AND {{part_last:UInt64}}" if self.count > 1 else ""

    @property
    def parameters(self) -> dict[str, object]:
        """The query parameters of `condition`."""
        if self.count == 1:
            return {}
        first, end = (number * 2**64 // self.count for number in (self.number, self.number + 1))
        return {"part_first": first, "part_last": end - 1}


OF_STATES = "states"
"""How the `journal_scheme` of a merged model begins."""

WHOLE = Part()
"""All of an interval's rows."""


@dataclass(frozen=True)
class Selection:
    """Which rows of a model to read: one team, insertion times in UTC, and filters on event names and properties.

    Attributes:
        team_id: the team.
        start, end: `[start, end)` of one interval, or of several that follow each other.
        include_events, exclude_events: names of events; none for no filter.
        starts: the beginning of each interval that the selection consists of, ascending, the first being `start`; empty
            for the one interval from `start`.
        filters: on properties; a row must pass all of them.
        part: which of the rows, where several queries share them.
    """

    team_id: int
    start: datetime
    end: datetime
    include_events: tuple[str, ...] = ()
    exclude_events: tuple[str, ...] = ()
    starts: tuple[datetime, ...] = ()
    filters: tuple[PropertyFilter, ...] = ()
    part: Part = WHOLE

    @property
    def parameters(self) -> dict[str, object]:
        """The query parameters that every model's query takes."""
        return {
            "team_id": self.team_id,
            "interval_start": _clickhouse_time(self.start),
            "interval_end": _clickhouse_time(self.end),
            "boundaries": [microseconds(start) for start in self.starts or (self.start,)],
            **self.part.parameters,
        }


@dataclass(frozen=True)
class Query:
    """A ClickHouse statement with `{name:Type}` placeholders, and the values that are bound to them."""

    sql: str
    parameters: Mapping[str, object]

    def without(self, columns: Sequence[str]) -> "Query":
        """The same rows without these columns of the answer, which ClickHouse then need not read."""
        if not columns:
            return self
        names = ", ".join(map(backquoted, columns))
        return Query(f"SELECT * EXCEPT ({names}) FROM (\n{self.sql.strip()}\n)", self.parameters)

    def with_short_parameters(self) -> "Query":
        """The same query, with each list that is longer than `PARAMETER_BYTES` in several parameters."""
        sql, parameters = self.sql, dict[str, object]()
        for name, value in self.parameters.items():
            lists = _short(value) if isinstance(value, (list, tuple)) else [value]
            if len(lists) == 1:
                parameters[name] = value
                continue
            numbered = {f"{name}_{number}": part for number, part in enumerate(lists)}
            parameters |= numbered
            sql = re.sub(rf"\{{{name}:([^{{}}]*)\}}", functools.partial(_concatenated, tuple(numbered)), sql)
        return Query(sql, parameters)

    def for_console(self) -> str:
        """The query with its values as `SET param_...` lines before it, to be pasted into clickhouse-client."""
        settings = "".join(f"SET param_{name} = {_console_value(value)};\n" for name, value in self.parameters.items())
        return f"{settings}{self.sql.strip()};\n"


PARAMETER_BYTES = 100_000
"""Bytes of one parameter of a query, at most: ClickHouse refuses a field of a request that has more than 128 KB, escapes and
quotes counted (`http_max_field_value_size`, which no query can change)."""


_ESCAPED = "'\\\t\n\r\0\b\f"
"""Characters that are sent as two."""


def _concatenated(names: Sequence[str], placeholder: re.Match[str]) -> str:
    return f"arrayConcat({', '.join(f'{{{name}:{placeholder[1]}}}' for name in names)})"


def _short(values: Sequence[object]) -> list[list[object]]:
    """The values in lists of up to `PARAMETER_BYTES`. A value that is longer is alone."""
    lists: list[list[object]] = [[]]
    size = 0
    for value in values:
        # As it is sent: in quotes, with a comma, and with a backslash for each character that needs one.
        text = str(value)
        length = len(text.encode()) + sum(map(text.count, _ESCAPED)) + 4
        if size + length > PARAMETER_BYTES and lists[-1]:
            lists.append([])
            size = 0
        lists[-1].append(value)
        size += length
    return lists


def _as_it_is(frame: pl.DataFrame) -> pl.DataFrame:
    return frame


@dataclass(frozen=True)
class Model:
    """What can be exported.

    Attributes:
        name: as in an export's `model`.
        description: what its rows are, for the asset's page.
        columns: default and optional columns in the order in which they are created.
        key: columns that identify a row. With `merge` they are the table's primary key; without, a destination must have
            at least the first, by which rows that are there are told from new ones.
        merge: None for a model whose rows are only appended.
        query: the ClickHouse query of a selection. It gives every column of the model, `IDENTITY`, `STATE` and `INTERVAL`,
            and may give more for `finish`. A row that counts in several of the selection's intervals comes once for each of
            them, as it would if that interval were asked for alone.
        fingerprints: the query of the fingerprint of each interval of a selection: its start in microseconds since 1970,
            rows, XOR and sum of their `STATE`.
        latest: the query of the rows of a merged model that no later interval has; all that its query gives, by default.
        finish: what is left to do on each frame of the query's answer, which may lack optional columns. It gives the
            model's columns, and what else the frame has, as it is.
        dictionary: a ClickHouse dictionary that `without_dictionary` does without.
        without_dictionary: the model for a source that lacks the dictionary: without the columns that need it, so that
            what a table has in them stays.
        needs: columns of the answer without which `finish` cannot give a column, by that column.
        filter_types: what a property filter may look at, the model's own first; empty for a model without properties.
        timestamps: the columns whose minimum and maximum are the first and the last time of its rows.
        source_tables: the tables that it reads.
        identity_scheme: what `IDENTITY` is made of, where a user may change that: identities of another scheme tell
            nothing of these. A word without spaces and colons.
        has_teams: its query selects the rows of one team; without, an export's `team_id` changes nothing.
        key_may_be_null: NULL in a column of the key is a value like any other. Without it no row of the source has one there.
        left_out_of_key: columns of the key that an export leaves out: without them not all rows can be told apart.
        state_scheme: likewise what `STATE` is made of.
        one_interval_a_query: its query cannot tell in which of several intervals a row counts: each is asked for alone.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    merge: Merge | None
    query: Callable[[Selection], Query]
    fingerprints: Callable[[Selection], Query]
    latest: Callable[[Selection], Query] | None = None
    finish: Callable[[pl.DataFrame], pl.DataFrame] = _as_it_is
    dictionary: str | None = None
    without_dictionary: "Model | None" = None
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    filter_types: tuple[FilterType, ...] = ()
    timestamps: tuple[str, str] | None = None
    source_tables: tuple[str, ...] = ()
    one_interval_a_query: bool = False
    has_teams: bool = True
    identity_scheme: str = ""
    key_may_be_null: bool = False
    left_out_of_key: tuple[str, ...] = ()
    state_scheme: str = "1"

    @property
    def compared(self) -> tuple[str, ...]:
        """The columns whose values decide which rows are the same, and which is the newer one."""
        return (*self.key, *(self.merge.version if self.merge else ()))

    def latest_fingerprints(self, selection: Selection) -> Query:
        """The query of the fingerprint of each interval's rows that no later interval has."""
        rows = (self.latest or self.query)(selection)
        return Query(fingerprints(rows.sql), rows.parameters)

    def latest_states(self, selection: Selection) -> Query:
        """The query of the states of these rows, in one array."""
        rows = (self.latest or self.query)(selection)
        return Query(f"SELECT groupArray({STATE}) FROM (\n{rows.sql.strip()}\n)", rows.parameters)

    @property
    def journaled(self) -> str:
        """The column of frames that the key journals keep."""
        return STATE if self.merge else IDENTITY

    @property
    def journal_scheme(self) -> str:
        """What the hashes in the key journals are made of. A model that was merged may be appended now, and the other way
        round.
        """
        return f"{OF_STATES}{self.identity_scheme}" if self.merge else self.identity_scheme

    @property
    def fingerprint_scheme(self) -> str:
        """What the hashes of a fingerprint are made of: `Fingerprint.scheme`."""
        return f"{self.journal_scheme}:{self.state_scheme}"

    def check_filters(self, filters: Sequence[PropertyFilter]) -> None:
        """Make sure that the model has what the filters look at.

        Raises:
            ValueError: it has no properties, or none of a filter's `type`.
        """
        if filters and not self.filter_types:
            raise ValueError(f"{self.name} have no properties to filter by")
        for one in filters:
            if one.type and one.type not in self.filter_types:
                raise ValueError(f"{self.name} have no properties of `type: {one.type}` (the filter on `{one.key}`)")


def fingerprints(rows: str) -> str:
    """The SQL of the fingerprint of each interval, over a query that gives `INTERVAL` and `STATE` of each row.

    What else the query gives ClickHouse does not compute.
    """
    return f"""
SELECT {INTERVAL}, count() AS rows, groupBitXor({STATE}) AS state_xor, sumWithOverflow({STATE}) AS state_sum
FROM (
{rows.strip()}
)
GROUP BY {INTERVAL}
"""


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970, exactly."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def moment(microseconds: int) -> datetime:
    """The time so many microseconds after 1970 began, in UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


def _clickhouse_time(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def _console_value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return quoted(f"[{', '.join(str(item) if isinstance(item, int) else quoted(str(item)) for item in value)}]")
    # ClickHouse reads a parameter as it reads a value of a TSV file.
    escaped = str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return str(value) if isinstance(value, int) else quoted(escaped)


def backquoted(name: str) -> str:
    """A name as ClickHouse's SQL has it."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def quoted(text: str) -> str:
    """A text as ClickHouse's SQL has it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
