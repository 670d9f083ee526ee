"""Columns that are left out, renamed and added: what is created, what ClickHouse is asked for, and what the frames hold."""

import json
import uuid
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from pg_exports.errors import SourceError
from pg_exports.models import (
    AS_READ,
    IDENTITY,
    INTERVAL,
    MODELS,
    STATE,
    AddedColumn,
    ColumnChange,
    Kind,
    Model,
    Selection,
    as_read,
    with_columns,
)
from pg_exports_tests.conftest import SAMPLE_HOURS, TEAM, Source
from pg_exports_tests.models.test_model import creating, in_a_console
from pg_exports_tests.source_rows import HOUR, event, insert_sessions, mapping, new_session, person, session

EVENTS, PERSONS, SESSIONS = MODELS["events"], MODELS["persons"], MODELS["sessions"]
EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)


def frame_of(source: Source, model: Model, hour: datetime, columns: Collection[str] | None = None) -> pl.DataFrame:
    """The model's rows of an hour, as an export reads them."""
    query = model.query(Selection(TEAM, hour, hour + HOUR))
    with source.resource().frames(query, model, columns=columns, log_comment="") as frames:
        return pl.concat(frames)


def added_values(source: Source, hour: datetime, added: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The added columns' values of one event, by name."""
    changes = {name: AddedColumn(expression=expression, type=type_) for name, (expression, type_) in added.items()}
    frame = frame_of(source, with_columns(EVENTS, changes), hour)
    return frame.select(*added).row(0, named=True)


def names_of(model: Model) -> list[str]:
    return [column.name for column in model.columns]


# Without changes


@EVERY_MODEL
def test_no_changes_are_the_model_itself(model: Model) -> None:
    assert with_columns(model, {}) is model


# Left out


def test_a_column_that_is_left_out_is_neither_created_nor_read(source: Source, hour: datetime) -> None:
    source.insert("events", event(hour, properties='{"$set": {"a": 1}, "$ip": "1.2.3.4"}'))
    model = with_columns(EVENTS, {"site_url": False, "distinct_id": False, "inserted_at": False, "ip": False})
    assert not {"site_url", "distinct_id", "inserted_at", "ip"} & set(names_of(model))
    assert model.key == ("uuid", "event", "team_id")
    frame = frame_of(source, model, hour)
    assert frame.columns == [*names_of(model), IDENTITY, STATE, INTERVAL]
    assert frame["set"].to_list() == ['{"a": 1}']


def test_documents_are_not_read_where_nothing_is_made_of_them(source: Source, hour: datetime) -> None:
    source.insert("events", event(hour))
    made_of_them = dict.fromkeys(("properties", "set", "set_once", "ip", "person_properties"), False)
    for changes, are_read in ((made_of_them, False), (made_of_them | {"ip": True}, True)):
        model = with_columns(EVENTS, changes)
        comment = json.dumps({"export": uuid.uuid4().hex})
        query = model.query(Selection(TEAM, hour, hour + HOUR))
        with source.resource().frames(query, model, log_comment=comment) as frames:
            assert sum(frame.height for frame in frames) == 1
        [read] = source.columns_read(json.loads(comment)["export"])
        assert ("properties" in read) is are_read
        assert "person_properties" not in read


@pytest.mark.parametrize("left_out", [{"properties"}, {"set"}, {"set", "ip"}, {"properties", "set_once", "ip"}])
def test_suspect_documents_are_read_exactly_whatever_is_left_out(
    source: Source, hour: datetime, left_out: set[str]
) -> None:
    twice = '{"$set": {"a": 1}, "$set": {"a": 2}, "$set_once": 3, "$ip": "1.2.3.4", "$ip": "x"}'
    broken = b'{"$set": {"a": "\xff"}, "$set": 1, "$set_once": "\xfe", "$ip": "x", "$ip": "\xfd"}'
    source.insert("events", event(hour, properties=twice, distinct_id="twice"))
    source.execute(
        f"INSERT INTO events (uuid, event, properties, team_id, distinct_id, timestamp, inserted_at) SELECT"
        f" generateUUIDv4(), 'e', unhex('{broken.hex()}'), 1, 'broken', now(), toDateTime64('{hour:%Y-%m-%d %H:%M:%S}', 6)"
    )
    whole = frame_of(source, EVENTS, hour).sort("distinct_id")
    model = with_columns(EVENTS, dict.fromkeys(left_out, False))
    frame = frame_of(source, model, hour).sort("distinct_id")
    assert frame.drop(AS_READ, strict=False).equals(whole.drop(*left_out, AS_READ))
    originals = as_read.originals(whole)
    assert originals[0].keys() == {"properties", "set_once", "ip"}
    kept = {
        row: {name: was for name, was in values.items() if name not in left_out} for row, values in originals.items()
    }
    assert as_read.originals(frame) == {row: values for row, values in kept.items() if values}


# Renamed


def test_a_renamed_column_has_its_new_name_everywhere(source: Source, hour: datetime) -> None:
    names = {"uuid": "event_id", "event": "name", "timestamp": "at", "properties": "props", "set": "event"}
    model = with_columns(EVENTS, dict[str, ColumnChange](names))
    assert names_of(model) == [names.get(column.name, column.name) for column in EVENTS.columns]
    assert (model.key, model.timestamps) == (("event_id", "name", "distinct_id", "team_id"), ("at", "at"))
    source.insert("events", event(hour, event="a", properties='{"$set": 1}'), event(hour, event="b"))
    whole, frame = (
        frame_of(source, some, hour).sort("uuid" if some is EVENTS else "event_id") for some in (EVENTS, model)
    )
    assert frame.columns == [*names_of(model), IDENTITY, STATE, INTERVAL]
    assert whole.rename(names).equals(frame)


def test_a_merged_models_key_and_version_are_renamed(source: Source, hour: datetime) -> None:
    names = {"distinct_id": "user", "person_version": "v", "person_distinct_id_version": "vd", "created_at": "since"}
    model = with_columns(PERSONS, dict[str, ColumnChange](names))
    assert model.merge
    assert (model.key, model.merge.version) == (("team_id", "user"), ("vd", "v"))
    assert model.timestamps == ("since", "since")
    who = uuid.uuid4()
    source.insert("person", person(hour, who, 7))
    source.insert("person_distinct_id2", mapping(hour, "a", who, 3))
    assert frame_of(source, model, hour).select("user", "vd", "v").rows() == [("a", 3, 7)]
    sessions = with_columns(SESSIONS, {"end_timestamp": "ended"})
    assert sessions.merge
    assert (sessions.merge.version, sessions.timestamps) == (("ended",), ("start_timestamp", "ended"))
    assert sessions.without_dictionary
    assert sessions.without_dictionary.merge == sessions.merge


def test_what_a_frame_cannot_hold_stands_beside_it_by_the_new_name(source: Source, hour: datetime) -> None:
    source.execute(
        "INSERT INTO events (event, team_id, distinct_id, properties, timestamp, inserted_at) SELECT unhex('FF'), 1,"
        f" unhex('FE'), '{{}}', now(), toDateTime64('{hour:%Y-%m-%d %H:%M:%S}', 6)"
    )
    model = with_columns(EVENTS, {"event": "distinct_id", "distinct_id": "event"})
    assert as_read.originals(frame_of(source, model, hour)) == {0: {"distinct_id": "\udcff", "event": "\udcfe"}}


def test_an_optional_column_that_is_wanted_or_renamed_is_created() -> None:
    model = with_columns(EVENTS, {"person_id": True, "inserted_at": "received_at"})
    assert {column.name for column in model.columns if column.optional} == {
        "person_properties",
        "elements_chain",
        "created_at",
    }
    assert {"person_id", "received_at"} <= set(names_of(model))


def test_the_sources_of_a_column_follow_it() -> None:
    model = with_columns(EVENTS, {"set": "changes", "plan": AddedColumn(expression="1", type="text")})
    sources = {column.name: column.sources for column in model.columns}
    assert sources["changes"] == ("events.properties",)
    assert sources["plan"] == ()


# Added


def test_an_added_column_is_an_expression_over_the_source(source: Source, hour: datetime) -> None:
    row = event(hour, properties='{"plan": "pro"}', person_properties='{"plan": "free"}', _offset=7)
    source.insert("events", row)
    assert added_values(
        source,
        hour,
        {
            "plan": ("JSONExtractString(properties, 'plan')", "text"),
            "persons plan": ("JSONExtractString(person_properties, 'plan')", "varchar( 20 )"),
            "_offset": ("e._offset", "bigint"),
            "commented": ("upper(event) -- as it was", "TEXT"),
            "of two": ("e.team_id, 2", "text"),
            'a "b" `c`': ("{team_id:Int64}", "int"),
            "raw": ("e.properties", "jsonb"),
        },
    ) == {
        "plan": "pro",
        "persons plan": "free",
        "_offset": 7,
        "commented": "$PAGEVIEW",
        "of two": "(1,2)",
        'a "b" `c`': TEAM,
        "raw": '{"plan": "pro"}',
    }


def test_added_columns_come_last_and_leave_the_others_as_they_are(source: Source, hour: datetime) -> None:
    source.insert("events", *(event(hour, distinct_id=name, properties='{"$set": 1, "$set": 2}') for name in "abc"))
    plan = AddedColumn(expression="'a'", type="text")
    model = with_columns(EVENTS, {"plan": plan, "event": "name"})
    assert names_of(model)[-1] == "plan"
    whole, frame = (frame_of(source, some, hour).sort("uuid") for some in (EVENTS, model))
    assert frame.drop("plan").equals(whole.rename({"event": "name"}))
    assert model.fingerprints is EVENTS.fingerprints


def test_an_added_column_is_read_where_it_is_asked_for(source: Source, hour: datetime) -> None:
    source.insert("events", event(hour))
    model = with_columns(EVENTS, {"broken": AddedColumn(expression="throwIf(e.team_id > 0, 'read')", type="integer")})
    default = [column.name for column in model.columns if not column.optional]
    assert "broken" in default
    frame = frame_of(source, model, hour, columns=set(default) - {"broken"})
    assert frame.columns == [*default[:-1], IDENTITY, STATE, INTERVAL]
    with pytest.raises(SourceError, match="read"):
        frame_of(source, model, hour, columns=default)


def test_persons_and_sessions_have_added_columns(source: Source, hour: datetime) -> None:
    who = uuid.uuid4()
    source.insert("person", person(hour, who, 1, properties='{"plan": "pro"}'))
    source.insert("person_distinct_id2", mapping(hour, "a", who))
    insert_sessions(source, session(new_session(hour), hour, entry_url="https://example.com/a"))
    plan = AddedColumn(expression="JSONExtractString(properties, 'plan')", type="text")
    assert frame_of(source, with_columns(PERSONS, {"plan": plan}), hour)["plan"].to_list() == ["pro"]
    secure = AddedColumn(expression="startsWith(sessions.entry_current_url, 'https:')", type="boolean")
    assert frame_of(source, with_columns(SESSIONS, {"secure": secure}), hour)["secure"].to_list() == [True]


EVERY_KIND = {
    "text": ("'a'", "TEXT", "a"),
    "text of a number": ("1.50::Decimal(9, 2)", "varchar(9)", "1.5"),
    "text of a list": ("[1, 2]", "text", "[1,2]"),
    "text null": ("CAST(NULL AS Nullable(String))", "text", None),
    "text null of any type": ("NULL", "text", None),
    "text empty": ("''", "text", ""),
    "low cardinality": ("toLowCardinality('a')", "text", "a"),
    "a uuid": ("toUUID('01234567-89ab-cdef-0123-456789abcdef')", "uuid", "01234567-89ab-cdef-0123-456789abcdef"),
    "json as it is": ("'{\"a\":  1.50}'", "jsonb", '{"a":  1.50}'),
    "json empty": ("''", "json", None),
    "json null": ("CAST(NULL AS Nullable(Int32))", "jsonb", None),
    "json of a map": ("map('a', [1, 2])", "jsonb", '{"a":[1,2]}'),
    "json of a number": ("toNullable(5)", "jsonb", "5"),
    "integer": ("toUInt8(5)", "smallint", 5),
    "integer of text": ("'-5'", "int8", -5),
    "integer of an empty text": ("''", "integer", None),
    "integer of a whole float": ("1000000000.0", "bigint", 10**9),
    "integer null": ("CAST(NULL AS Nullable(Int8))", "integer", None),
    "integer of 63 bits": ("toUInt128('9223372036854775807')", "bigint", 2**63 - 1),
    "float": ("0.1", "double precision", 0.1),
    "float of text": ("'1e3'", "float8", 1000.0),
    "float infinite": ("inf", "float8", float("inf")),
    "float null": ("CAST(NULL AS Nullable(Float32))", "float8", None),
    "float of an empty text": ("''", "float8", None),
    "boolean": ("1 = 1", "boolean", True),
    "boolean of text": ("'false'", "bool", False),
    "boolean of an empty text": ("''", "bool", None),
    "time": ("toDateTime64('2026-01-02 03:04:05.678901', 6, 'Asia/Tokyo')", "timestamptz",
        datetime(2026, 1, 1, 18, 4, 5, 678901, UTC)),
    "time of a date": ("toDate('2026-01-02')", "timestamp", datetime(2026, 1, 2, tzinfo=UTC)),
    "time null": ("CAST(NULL AS Nullable(DateTime))", "timestamp with time zone", None),
    "list": ("['a', 'b']", "text[]", ["a", "b"]),
    "list of numbers": ("[1, NULL]", "TEXT [ ]", ["1", None]),
}  # fmt: skip


def test_a_value_of_any_clickhouse_type_arrives_as_what_its_postgres_type_needs(source: Source, hour: datetime) -> None:
    source.insert("events", event(hour))
    added = {name: (expression, type_) for name, (expression, type_, _) in EVERY_KIND.items()}
    assert added_values(source, hour, added) == {name: value for name, (_, _, value) in EVERY_KIND.items()}


@pytest.mark.parametrize(
    ("expression", "type_", "said"),
    [
        ("1.5", "integer", "Column x holds a value that is no whole number of 64 bits"),
        ("1.5::Decimal(9, 2)", "integer", "no whole number of 64 bits"),
        ("toUInt64(18446744073709551615)", "bigint", "no whole number of 64 bits"),
        ("'it''s'", "bigint", "no whole number of 64 bits"),
        ("'much'", "double precision", "Column x holds a value that is no number"),
        ("'perhaps'", "boolean", "perhaps"),
        ("5", "boolean", "5"),
        ("'yesterday'", "timestamptz", "no time with its year"),
        ("'a'", "text[]", "Code:"),
        ("no_such_column", "text", "no_such_column"),
    ],
)
def test_a_value_that_its_type_cannot_be_is_an_error_and_never_another_value(
    source: Source, hour: datetime, expression: str, type_: str, said: str
) -> None:
    source.insert("events", event(hour))
    with pytest.raises(SourceError, match=said):
        added_values(source, hour, {"x": (expression, type_)})


# In a console, and in ranges


@EVERY_MODEL
def test_a_changed_query_can_be_pasted_into_a_console(model: Model, hour: datetime) -> None:
    changes: dict[str, ColumnChange] = {"it's a `name`": AddedColumn(expression="'it''s' -- so", type="jsonb")}
    changes |= {"person_id": "who"} if "person_id" in names_of(model) else {"duration": False}
    changed = with_columns(model, changes)
    query = (changed.without_dictionary or changed).query(Selection(TEAM, hour, hour + HOUR))
    tables = creating("events", "person", "person_distinct_id2", "raw_sessions")
    assert in_a_console(*tables, query.for_console(), query.without(["it's a `name`"]).for_console()) == []


@EVERY_MODEL
def test_the_samples_rows_are_the_same_under_other_names(model: Model, sample: Source, sample_end: datetime) -> None:
    selection = Selection(TEAM, sample_end - SAMPLE_HOURS * HOUR, sample_end)
    others = {column.name: f"{column.name}_" for column in model.columns if column.name != "team_id"}
    changed = with_columns(model, {**others, "one": AddedColumn(expression="1", type="integer")})
    frames = []
    for some in (model, changed):
        with sample.resource().frames(some.query(selection), some, log_comment="") as answer:
            frames.append(pl.concat(answer))
    key = [name for name in model.key if name != "team_id"]
    before, after = frames[0].sort(key), frames[1].sort([others[name] for name in key])
    if model is EVENTS:  # of an event that ClickHouse holds twice any copy may come
        before, after = before.drop("created_at", "inserted_at"), after.drop("created_at_", "inserted_at_")
    assert after["one"].unique().to_list() == [1]
    assert after.drop("one").columns == [others.get(name, name) for name in before.columns]
    assert after.drop("one").rows() == before.rows()


# Types and names


@pytest.mark.parametrize(
    ("written", "canonical", "kind"),
    [
        ("text", "TEXT", Kind.TEXT),
        ("Character Varying ( 200 )", "VARCHAR(200)", Kind.TEXT),
        ("char(2)", "CHAR(2)", Kind.TEXT),
        ("timestamptz", "TIMESTAMP WITH TIME ZONE", Kind.TIMESTAMP),
        ("timestamp  without\ttime zone", "TIMESTAMP", Kind.TIMESTAMP),
        ("Text []", "TEXT[]", Kind.TEXT_LIST),
        ("INT4", "INTEGER", Kind.INTEGER),
    ],
)
def test_a_type_is_created_in_its_canonical_spelling(written: str, canonical: str, kind: Kind) -> None:
    [column] = with_columns(EVENTS, {"x": AddedColumn(expression="1", type=written)}).columns[-1:]
    assert (column.postgres_type, column.kind, column.optional) == (canonical, kind, False)


@pytest.mark.parametrize(
    "type_", ["numeric", "real", "text(5)", "varchar(0)", "varchar()", "int[]", "", "text); DROP TABLE x; --"]
)
def test_a_type_that_exports_do_not_write_is_refused_with_those_that_they_do(type_: str) -> None:
    with pytest.raises(ValidationError, match=r"must be one of TEXT, VARCHAR or VARCHAR\(n\), .*TEXT\[\], not"):
        AddedColumn(expression="1", type=type_)


def test_an_expression_must_be_one() -> None:
    with pytest.raises(ValidationError, match="`expression` must be a ClickHouse expression"):
        AddedColumn(expression=" \n", type="text")


ONE = AddedColumn(expression="1", type="integer")


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (EVENTS, {"evnt": False}, "events has no column `evnt`: it has uuid, event,"),
        (EVENTS, {"evnt": "name"}, "no column `evnt`"),
        (EVENTS, {"evnt": True}, "no column `evnt`"),
        (EVENTS, {"uuid": False}, "`uuid` cannot be left out"),
        (PERSONS, {"distinct_id": False}, "`distinct_id` cannot be left out"),
        (PERSONS, {"person_version": False}, "`person_version` cannot be left out"),
        (SESSIONS, {"end_timestamp": False}, "`end_timestamp` cannot be left out"),
        (EVENTS, {"team_id": "team"}, "`team_id` cannot be renamed"),
        (EVENTS, {"event": "ip"}, "two columns would be called `ip`"),
        (EVENTS, {"event": "name", "set": "name"}, "two columns would be called `name`"),
        (EVENTS, {"event": "plan", "plan": ONE}, "two columns would be called `plan`"),
        (EVENTS, {"event": ONE}, "`event` is a column of events"),
        (EVENTS, {"suspect": ONE}, "`suspect` is a column of events"),
        (EVENTS, {"event": ""}, "1 to 63 bytes"),
        (EVENTS, {"event": "ä" * 32}, "1 to 63 bytes"),
        (EVENTS, {"x" * 64: ONE}, "1 to 63 bytes"),
        (EVENTS, {"event": "identity"}, "no column may be called identity, row_state, as_read, interval_start"),
        (EVENTS, {"interval_start": ONE}, "no column may be called"),
    ],
)
def test_changes_that_cannot_be_are_refused(model: Model, changes: dict[str, ColumnChange], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_columns(model, changes)
