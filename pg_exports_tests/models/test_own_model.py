"""A user's own query as a model: what it may be, and what an export makes of it."""

import math
import uuid
from datetime import UTC, date, datetime
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from pg_exports.errors import SourceError
from pg_exports.fingerprint import Fingerprint
from pg_exports.models import (
    IDENTITY,
    INTERVAL,
    STATE,
    AddedColumn,
    ColumnChange,
    Model,
    OwnModel,
    Selection,
    with_columns,
)
from pg_exports.models.model import microseconds
from pg_exports_tests.conftest import TEAM, Source
from pg_exports_tests.models.test_model import creating, in_a_console
from pg_exports_tests.source_rows import HOUR, MICROSECOND, event

COUNTS = {
    "name": "event_counts",
    "query": """
        SELECT event, distinct_id, count() AS times, max(timestamp) AS last_seen
        FROM events
        WHERE team_id = {team_id} AND inserted_at >= {interval_start} AND inserted_at < {interval_end}
        GROUP BY event, distinct_id
    """,
    "columns": {"event": "text", "distinct_id": "varchar(200)", "times": "bigint", "last_seen": "timestamptz"},
    "key": ["event", "distinct_id"],
}

STATES = """
    SELECT number % 3 AS id, if(number = 8, NULL, number) AS version, toString(number) AS state
    FROM numbers(9)
    WHERE {interval_start} < {interval_end}
"""


def own(**changes: Any) -> OwnModel:
    return OwnModel(**(COUNTS | changes))


def frame_of(source: Source, model: Model, hour: datetime) -> pl.DataFrame:
    """The model's rows of an hour, as an export reads them."""
    query = model.query(Selection(TEAM, hour, hour + HOUR))
    with source.resource().frames(query, model, log_comment="") as frames:
        return pl.concat(frames)


def fingerprint(source: Source, model: Model, hour: datetime) -> list[tuple[int, Fingerprint]]:
    rows = source.resource().rows(model.fingerprints(Selection(TEAM, hour, hour + HOUR)), log_comment="")
    return [(start, Fingerprint(*parts)) for start, *parts in rows]


def columns(model: Model) -> list[tuple[str, str]]:
    return [(column.name, column.postgres_type) for column in model.columns]


# Rows


def test_a_query_gives_its_rows_of_one_interval(source: Source, hour: datetime) -> None:
    source.insert(
        "events",
        event(hour, event="a"),
        event(hour + HOUR - MICROSECOND, event="a", distinct_id="b"),
        event(hour, event="a"),
        event(hour - MICROSECOND, event="too early"),
        event(hour + HOUR, event="too late"),
        event(hour, event="another team's", team_id=TEAM + 1),
    )
    model = own().as_model()
    assert columns(model) == [
        ("event", "TEXT"),
        ("distinct_id", "VARCHAR(200)"),
        ("times", "BIGINT"),
        ("last_seen", "TIMESTAMP WITH TIME ZONE"),
    ]
    assert (model.key, model.merge, model.timestamps) == (("event", "distinct_id"), None, ("last_seen", "last_seen"))
    assert model.one_interval_a_query
    frame = frame_of(source, model, hour)
    assert frame.columns == ["event", "distinct_id", "times", "last_seen", IDENTITY, STATE, INTERVAL]
    assert frame.drop(IDENTITY, STATE).sort("distinct_id").rows() == [
        ("a", "a", 2, hour.astimezone(UTC), microseconds(hour)),
        ("a", "b", 1, hour + HOUR - MICROSECOND, microseconds(hour)),
    ]


def test_appended_rows_have_the_fingerprint_that_the_source_gives(source: Source, hour: datetime) -> None:
    model = own().as_model()
    assert fingerprint(source, model, hour) == []
    source.insert("events", *(event(hour, distinct_id=f"{n}") for n in range(5)), event(hour))
    before = Fingerprint.of(frame_of(source, model, hour)[STATE])
    assert before.rows == 6
    assert fingerprint(source, model, hour) == [(microseconds(hour), before)]
    source.insert("events", event(hour, distinct_id="late"))
    assert fingerprint(source, model, hour) == [
        (microseconds(hour), Fingerprint.of(frame_of(source, model, hour)[STATE]))
    ]
    assert fingerprint(source, model, hour) != [(microseconds(hour), before)]


def test_of_rows_with_one_key_one_is_appended_and_null_is_a_key_of_its_own(source: Source, hour: datetime) -> None:
    model = own(
        query="""
            SELECT arrayJoin([(NULL, 1), ('', 1), ('NULL', 1), ('a', 1), ('a', 1), (NULL, 1), ('a', 2), (NULL, NULL)]) AS t,
                t.1 AS name, t.2 AS n
            WHERE {interval_start} < {interval_end}
        """,
        columns={"name": "text", "n": "smallint"},
        key=["name", "n"],
    ).as_model()
    frame = frame_of(source, model, hour)
    rows = [(None, None), (None, 1), ("", 1), ("NULL", 1), ("a", 1), ("a", 2)]
    assert frame.select("name", "n").sort("name", "n").rows() == rows
    assert frame[IDENTITY].n_unique() == len(rows)
    assert fingerprint(source, model, hour) == [(microseconds(hour), Fingerprint.of(frame[STATE]))]


def test_merged_rows_are_those_with_the_greatest_version(source: Source, hour: datetime) -> None:
    model = own(
        query=STATES, columns={"id": "bigint", "state": "text", "version": "bigint"}, key=["id"], version=["version"]
    ).as_model()
    assert model.merge
    assert (model.merge.version, model.key, model.timestamps) == (("version",), ("id",), None)
    frame = frame_of(source, model, hour)
    assert fingerprint(source, model, hour) == [(microseconds(hour), Fingerprint.of(frame[STATE]))]
    assert frame.drop(IDENTITY, STATE).sort("id").rows() == [
        (0, "6", 6, microseconds(hour)),
        (1, "7", 7, microseconds(hour)),
        (2, "5", 5, microseconds(hour)),
    ]


def test_an_own_models_columns_can_be_changed(source: Source, hour: datetime) -> None:
    source.insert("events", event(hour, event="a"), event(hour, event="a"))
    changes: dict[str, ColumnChange] = {
        "event": "name",
        "last_seen": False,
        "many": AddedColumn(expression="own.times > 1", type="boolean"),
        "upper": AddedColumn(expression="upper(event)", type="text"),
    }
    model = with_columns(own().as_model(), changes)
    assert (model.key, model.timestamps) == (("name", "distinct_id"), None)
    frame = frame_of(source, model, hour)
    assert frame.drop(IDENTITY, STATE, INTERVAL).rows(named=True) == [
        {"name": "a", "distinct_id": "a", "times": 2, "many": True, "upper": "A"}
    ]
    assert fingerprint(source, model, hour) == [(microseconds(hour), Fingerprint.of(frame[STATE]))]


# Keys


def keyed(source: Source, hour: datetime, type_: str, *expressions: str, key: str = "k") -> list[object]:
    """The values of a key's column, as an export reads them, of a query with a row for each expression."""
    rows = " UNION ALL ".join(f"SELECT {expression} AS k" for expression in expressions)
    query = f"SELECT k, 1 AS n FROM ({rows}) WHERE {{interval_start}} < {{interval_end}}"
    version = ["k"] if key != "k" else []
    model = own(query=query, columns={"k": type_, "n": "integer"}, key=[key], version=version).as_model()
    return frame_of(source, model, hour)["k"].to_list()


AT = "2026-11-20 13:00:00"
IN_BERLIN = "toTimezone(toDateTime('2026-10-25 0{}:30:00', 'UTC'), 'Europe/Berlin')"


@pytest.mark.parametrize(
    ("type_", "expression", "value"),
    [
        ("timestamptz", f"toDateTime64('{AT}.1234567', 9, 'UTC')", f"{AT}.123456700"),
        ("timestamptz", f"'{AT}.1234567Z'", f"{AT}.1234567Z"),
        ("timestamptz", "1763632800.1234567", "1763632800.1234567"),
        ("timestamptz", "''", ""),
        ("timestamp", f"toDateTime64('{AT}.000000001', 9, 'UTC')", f"{AT}.000000001"),
        ("date", f"toDateTime('{AT}', 'UTC')", AT),
        ("date", f"'{AT}'", AT),
        ("date", "toUInt32(1763632800)", "1763632800"),
        ("bigint", "'007'", "007"),
        ("bigint", "''", ""),
        ("double precision", "toUInt64(9007199254740993)", "9007199254740993"),
        ("double precision", "toDecimal128('0.1000000000000000000001', 30)", "0.1000000000000000000001"),
        ("double precision", "'0.10'", "0.10"),
        ("boolean", "'yes'", "yes"),
        ("char(3)", "'a '", "a "),
        # The second time that clocks showed this.
        ("text", IN_BERLIN.format(1), "2026-10-25 02:30:00"),
    ],
)
@pytest.mark.parametrize("constant", ["{}", "materialize({})"])
def test_a_key_or_version_that_its_type_cannot_hold_is_refused_with_column_value_and_remedy(
    source: Source, hour: datetime, type_: str, expression: str, value: str, constant: str
) -> None:
    for key in ("k", "n"):
        with pytest.raises(SourceError) as refused:
            keyed(source, hour, type_, constant.format(expression), key=key)
        assert f'Column k, by which rows are told apart, holds "{value}", which' in str(refused.value)
        assert "Give the column another type, or round the value in the query." in str(refused.value)
        assert "UInt8" not in str(refused.value)


@pytest.mark.parametrize(
    ("type_", "expressions", "count"),
    [
        ("timestamptz", (f"toDateTime64('{AT}.123456000', 9, 'UTC')", f"toDateTime64('{AT}.123457000', 9, 'UTC')"), 2),
        ("timestamptz", (IN_BERLIN.format(0), IN_BERLIN.format(1)), 2),
        ("timestamptz", (f"'{AT}'", f"'{AT}Z'", "'2026-11-20T14:00:00+01:00'"), 1),
        ("timestamptz", ("toNullable(toDate('2026-11-20'))", "NULL"), 2),
        ("timestamptz", ("NULL",), 1),
        ("date", ("toDateTime('2026-11-20 00:00:00', 'UTC')", "toDateTime('2026-11-21 00:00:00', 'UTC')"), 2),
        ("date", ("'2026-11-20'", "NULL"), 2),
        ("bigint", ("toDecimal64('1.00', 2)", "toDecimal64('2', 2)"), 2),
        ("double precision", ("0.1", "0.", "-0."), 2),
        ("double precision", ("toFloat32(0.1)", "toFloat32(0.2)"), 2),
        ("boolean", ("true", "false"), 2),
        ("boolean", ("'true'", "'false'", "'true'"), 2),
        ("text", ("'a'", "'a '", "'A'", "''", "NULL"), 5),
        ("text", ("toFixedString('a', 3)", "toFixedString('ab', 3)"), 2),
        ("uuid", ("'AB000000-0000-4000-8000-000000000000'", "'ab000000-0000-4000-8000-000000000000'"), 1),
    ],
)
def test_keys_are_one_where_they_are_one_value_and_not_otherwise(
    source: Source, hour: datetime, type_: str, expressions: tuple[str, ...], count: int
) -> None:
    assert len(keyed(source, hour, type_, *expressions)) == count


def test_a_uuid_in_capitals_is_written_as_postgres_has_it(source: Source, hour: datetime) -> None:
    assert keyed(source, hour, "uuid", "'AB000000-0000-4000-8000-00000000000C'") == [
        "ab000000-0000-4000-8000-00000000000c"
    ]


@pytest.mark.parametrize(
    ("type_", "expression", "said"),
    [
        ("date", "'soon'", "no date like 2026-11-20"),
        ("date", "'2026-13-01'", "no date like 2026-11-20"),
        ("timestamptz", "'5'", "no time with its year"),
        ("timestamptz", "'soon, in 2026'", "no time with its year"),
        ("timestamptz", "'2026-02-31 00:00:00'", "no time with its year"),
        ("bigint", "'soon'", "no whole number of 64 bits"),
        ("double precision", "'soon'", "no number"),
    ],
)
@pytest.mark.parametrize("constant", ["{}", "materialize({})"])
def test_a_value_that_is_none_of_its_type_is_refused_and_not_guessed(
    source: Source, hour: datetime, type_: str, expression: str, said: str, constant: str
) -> None:
    query = f"SELECT {constant.format(expression)} AS v, 1 AS n WHERE {{interval_start}} < {{interval_end}}"
    model = own(query=query, columns={"v": type_, "n": "integer"}, key=["n"]).as_model()
    with pytest.raises(SourceError, match=f"Column v holds a value that is {said}"):
        frame_of(source, model, hour)


def test_a_value_that_is_no_key_lands_as_its_nearest(source: Source, hour: datetime) -> None:
    query = f"""
        SELECT toDateTime64('{AT}.1234567', 9, 'UTC') AS at, '{AT}' AS day, '' AS nothing, nan AS f, 1 AS n
        WHERE {{interval_start}} < {{interval_end}}
    """
    types = {"at": "timestamptz", "day": "date", "nothing": "timestamptz", "f": "float8", "n": "integer"}
    frame = frame_of(source, own(query=query, columns=types, key=["n"]).as_model(), hour)
    [(at, day, nothing, number)] = frame.select("at", "day", "nothing", "f").rows()
    assert (at, day, nothing) == (datetime(2026, 11, 20, 13, 0, 0, 123456, UTC), date(2026, 11, 20), None)
    assert math.isnan(number)


@pytest.mark.parametrize("version", [[], ["n"]])
def test_any_change_of_a_row_changes_its_state_and_not_its_identity(
    source: Source, hour: datetime, version: list[str]
) -> None:
    types = {"id": "text", "n": "integer", "t": "text", "f": "float8", "d": "date", "at": "timestamptz", "b": "boolean"}
    types |= {"j": "jsonb", "l": "text[]"}
    values = {"n": "1", "t": "NULL", "f": "NULL", "d": "NULL", "at": "NULL", "b": "NULL", "j": "NULL", "l": "['a']"}
    changes = {
        "n": ["2"],
        "t": ["''", "'a'"],
        "f": ["0", "1"],
        "d": ["toDate32(0)"],
        "at": ["toDateTime64(0, 6, 'UTC')"],
    }
    changes |= {"b": ["false", "true"], "j": ["'{}'"], "l": ["['a', NULL]", "['NULL']", "[]"]}

    def hashes(changed: dict[str, str]) -> tuple[int, int]:
        columns = ", ".join(f"{value} AS {name}" for name, value in (values | changed).items())
        query = f"SELECT 'x' AS id, {columns} WHERE {{interval_start}} < {{interval_end}}"
        model = own(query=query, columns=types, key=["id"], version=version).as_model()
        frame = frame_of(source, model, hour)
        assert fingerprint(source, model, hour) == [(microseconds(hour), Fingerprint.of(frame[STATE]))]
        [(identity, state)] = frame.select(IDENTITY, STATE).rows()
        return identity, state

    seen = [hashes({}), *(hashes({name: value}) for name, some in changes.items() for value in some)]
    assert len({identity for identity, _ in seen}) == 1
    assert len({state for _, state in seen}) == len(seen)


@pytest.mark.parametrize("version", [[], ["v"]])
def test_different_rows_with_one_key_have_one_fingerprint(source: Source, hour: datetime, version: list[str]) -> None:
    query = """
        SELECT number % 1000 AS id, toString(sipHash64(number)) AS t, 1 AS v FROM numbers_mt(200000)
        WHERE {interval_start} < {interval_end}
    """
    types = {"id": "bigint", "t": "text", "v": "bigint"}
    model = own(query=query, columns=types, key=["id"], version=version).as_model()
    assert fingerprint(source, model, hour) == fingerprint(source, model, hour)
    one, other = (frame_of(source, model, hour).sort("id") for _ in range(2))
    assert one.height == other.height == 1000
    if version:
        assert one.equals(other)
        assert fingerprint(source, model, hour) == [(microseconds(hour), Fingerprint.of(one[STATE]))]


# Queries


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS n WHERE {interval_start} < {interval_end};",
        "SELECT 1 AS n WHERE {interval_start} < {interval_end} ; -- that is; all\n/* and ; more */ ;",
        "SELECT 1 AS n WHERE {interval_start} < {interval_end} -- {other} 'quote",
        "WITH one AS (SELECT 1 AS n) SELECT n FROM one WHERE {interval_start} < {interval_end}",
        "SELECT 1 AS n WHERE {interval_start} < {interval_end} SETTINGS max_threads = 1",
        "SELECT 1 AS n WHERE {interval_start:DateTime64(6)} < { interval_end : DateTime }",
        "SELECT 1 AS n WHERE toTimeZone({interval_start:DateTime64(3, 'Asia/Tokyo')}, 'UTC') < {interval_end}",
        "SELECT 1 AS n, ';{other}' AS `;{x}` WHERE {interval_start} < {interval_end} AND {team_id:UInt8} = 1",
        "SELECT n, '/* more columns */' FROM (SELECT 1 AS n) AS t WHERE {interval_start} < {interval_end}",
    ],
)
def test_a_query_may_be_written_in_many_ways(source: Source, hour: datetime, query: str) -> None:
    model = own(query=query, columns={"n": "integer"}, key=["n"]).as_model()
    assert frame_of(source, model, hour)["n"].to_list() == [1]


def test_an_interval_is_bound_in_utc_whatever_type_the_query_has(source: Source, hour: datetime) -> None:
    query = """
        SELECT {interval_start:DateTime64(6, 'Asia/Tokyo')} AS start, {interval_end:DateTime} AS end_, 1 AS n,
            '{interval_start}' AS text
    """
    types = {"start": "timestamptz", "end_": "timestamptz", "n": "integer", "text": "text"}
    model = own(query=query, columns=types, key=["n"]).as_model()
    assert frame_of(source, model, hour).drop(IDENTITY, STATE, INTERVAL).rows() == [
        (hour, hour + HOUR, 1, "{interval_start}")
    ]


def test_a_table_may_be_read_final(source: Source, hour: datetime) -> None:
    source.execute("SYSTEM STOP MERGES events")
    twice = event(hour, uuid=uuid.uuid4())
    source.insert("events", twice)
    source.insert("events", twice)
    query = """
        SELECT toString(uuid) AS id, count() AS times FROM events AS e FINAL
        WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end} GROUP BY id
    """
    model = own(query=query, columns={"id": "uuid", "times": "integer"}, key=["id"]).as_model()
    assert frame_of(source, model, hour)["times"].to_list() == [1]


def test_the_queries_can_be_pasted_into_a_console(hour: datetime) -> None:
    selection = Selection(TEAM, hour, hour + HOUR)
    model = own().as_model()
    queries = [model.query(selection), model.fingerprints(selection)]
    assert in_a_console(*creating("events"), *(query.for_console() for query in queries)) == []


def test_a_column_that_the_query_does_not_give_is_named(source: Source, hour: datetime) -> None:
    model = own(columns=COUNTS["columns"] | {"nothing": "text"}).as_model()  # type: ignore[operator]  # a dict, too
    with pytest.raises(SourceError, match="nothing"):
        frame_of(source, model, hour)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "my model"}, "letters, digits and underscores"),
        ({"query": "SELECT 1"}, r"must name {interval_start} and {interval_end}"),
        ({"query": "SELECT {interval_start}"}, r"must name {interval_end}, between"),
        ({"query": "SELECT '{interval_start}', {interval_end} -- {interval_start}"}, r"must name {interval_start},"),
        (
            {"query": "SELECT {interval_start}, {interval_end}, {start}"},
            r"has a placeholder {start}, and there are only",
        ),
        ({"query": "SELECT {interval_start}, {interval_end}, {team:Int64}"}, "has a placeholder {team}"),
        ({"query": "SELECT {interval_start:String}, {interval_end}"}, r"must have {interval_start} without a type"),
        ({"query": "SELECT {interval_start}; SELECT {interval_end}"}, "one statement"),
        ({"columns": {}}, "at least one column"),
        ({"columns": {"a": "money"}}, "must be one of TEXT"),
        ({"columns": {"": "text"}}, "1 to 63 bytes"),
        ({"columns": {"identity": "text"}}, "no column may be called"),
        ({"key": []}, "`key` must have at least one column"),
        ({"key": ["event", "uuid"]}, "`key` has `uuid`, which is not among the `columns`"),
        ({"key": ["event", "event"]}, "may be in `key` and `version` once"),
        ({"version": ["event"]}, "may be in `key` and `version` once"),
        ({"version": ["at"]}, "`version` has `at`, which is not among"),
        ({"columns": COUNTS["columns"] | {"event": "jsonb"}}, "`key` has `event`, and JSONB cannot be compared"),  # type: ignore[operator]
        ({"sql": "SELECT 1"}, "Extra inputs"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        own(**changes)
