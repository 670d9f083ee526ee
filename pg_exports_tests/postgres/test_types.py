"""Every pair of a column's kind and a destination's type: what goes in comes out, or nothing goes in."""

import itertools
import json
import re
from datetime import date, datetime, timedelta
from typing import Any

import pytest

from pg_exports.errors import DestinationError
from pg_exports.models import Column, Kind, Model
from pg_exports.models.events import EVENTS
from pg_exports.models.model import Merge
from pg_exports.models.persons import PERSONS
from pg_exports.models.sessions import SESSIONS
from pg_exports.postgres import table as tables
from pg_exports.postgres import types
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.table import Destination
from pg_exports_tests.conftest import Target
from pg_exports_tests.postgres.test_ingest import MOMENT, UUID, create, creation, event, load, load_by, person

DEEP = '{"a":' * 500 + "1" + "}" * 500
TEXTS = ["", " ", "é🦔", "a\\nb\t'\"\\", "NULL", "\\N", "\u2028\ufeff\x7f", "x" * 1_000_000, None]
DOCUMENTS = [
    "{}", "[]", '""', "null", "1e300", "-0.0", "123456789012345678901234567890.5", '{"é🦔": "\\\\u0000 \\u00e9"}', DEEP,
    json.dumps({"a": "x" * 1_000_000}), None,
]  # fmt: skip
TIMES = [
    "1970-01-01T00:00:00+00:00", "1969-12-31T23:59:59.999999+00:00", "1900-01-01T00:00:00.000001+00:00",
    "2262-04-11T23:47:16.854775+00:00", "2299-12-31T23:59:59.999999+00:00", "2024-02-29T12:00:00.123456+00:00",
    "2026-03-29T01:30:00+00:00", None,
]  # fmt: skip
LISTS: list[list[str | None] | None] = [[], [""], [None], ["a", None, "é🦔", "NULL", '{"x",}'], ["x" * 100_000], None]
VALUES: dict[Kind, list[Any]] = {
    Kind.TEXT: TEXTS,
    Kind.JSON: DOCUMENTS,
    Kind.INTEGER: [0, -1, 1, None],
    Kind.FLOAT: [0.0, -0.0, 0.1, 1.7976931348623157e308, 5e-324, float("nan"), float("inf"), float("-inf"), None],
    Kind.BOOLEAN: [True, False, None],
    Kind.DATE: [date(1970, 1, 1), date(1, 1, 1), date(1900, 2, 28), date(2299, 12, 31), None],
    Kind.TIMESTAMP: [datetime.fromisoformat(time) if time else None for time in TIMES],
    Kind.TEXT_LIST: LISTS,
}
EXTREMES: dict[str, list[Any]] = {
    "int2": [-(2**15), 2**15 - 1],
    "int4": [-(2**31), 2**31 - 1],
    "int8": [-(2**63), 2**63 - 1],
    "numeric": [-(2**63), 2**63 - 1],
}
UUIDS = [UUID.format(1), "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", None]
PAIRS = [(kind, type_) for kind, conversions in types._CONVERSIONS.items() for type_ in conversions]


ID = Column("id", Kind.INTEGER, "BIGINT")


def test_what_goes_in_comes_out_for_every_pair_of_kind_and_type(target: Target) -> None:
    has_citext = bool(target.rows("SELECT 1 FROM pg_available_extensions WHERE name = 'citext'"))
    if has_citext:
        target.execute("CREATE EXTENSION IF NOT EXISTS citext SCHEMA pg_catalog")
    pairs = [(kind, type_) for kind, type_ in PAIRS if has_citext or type_ != "citext"]
    columns = {f"{kind.value} {type_}": (kind, type_, values_of(kind, type_)) for kind, type_ in pairs}
    model = Model(
        "things",
        "",
        (ID, *(Column(name, kind, type_) for name, (kind, type_, _) in columns.items())),
        ("id",),
        None,
        EVENTS.query,
        EVENTS.fingerprints,
    )
    create(target, "things", "id bigint", *(f"{quoted(name)} {type_}" for name, (_, type_, _) in columns.items()))
    longest = max(len(values) for *_, values in columns.values())
    load(target, model, *({"id": n} | {name: at(v, n) for name, (*_, v) in columns.items()} for n in range(longest)))
    asked = ", ".join(as_text(kind, type_, quoted(name)) for name, (kind, type_, _) in columns.items())
    landed = target.rows(f"SELECT {asked} FROM things ORDER BY id")
    for index, (name, (kind, type_, values)) in enumerate(columns.items()):
        wanted = [expected(at(values, n), kind, type_) for n in range(longest)]
        assert [row[index] for row in landed] == wanted, name


def values_of(kind: Kind, type_: str) -> list[Any]:
    return UUIDS if type_ == "uuid" else [*VALUES[kind], *EXTREMES.get(type_, [])]


def at(values: list[Any], n: int) -> Any:
    return values[n] if n < len(values) else None


def as_text(kind: Kind, type_: str, value: str) -> str:
    """What Postgres itself says that the value is, without a driver's conversion in between."""
    if kind is Kind.TIMESTAMP:
        in_utc = f"{value} AT TIME ZONE 'UTC'" if type_ == "timestamptz" else value
        return f"to_char({in_utc}, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
    return f"to_json({value})::text" if kind is Kind.TEXT_LIST else f"{value}::text"


def expected(value: Any, kind: Kind, type_: str) -> Any:
    if value is None:
        return None
    match kind:
        case Kind.TIMESTAMP:
            return f"{value.replace(tzinfo=None):%Y-%m-%dT%H:%M:%S.%f}"
        case Kind.TEXT_LIST:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        case Kind.BOOLEAN:
            return str(value).lower()
        case Kind.FLOAT:
            return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(str(value)) or shortest(value)
        case Kind.JSON if type_ == "jsonb":
            return AS_JSONB.get(value) or value.replace('{"a":', '{"a": ').replace(":  ", ": ")
    # Blanks at the end of CHAR(n) are no part of the value: Postgres's own cast takes them off.
    return str(value).rstrip(" ") if type_ == "bpchar" else str(value)


AS_JSONB = {
    "1e300": "1" + "0" * 300,
    "-0.0": "0.0",
    '{"é🦔": "\\\\u0000 \\u00e9"}': '{"é🦔": "\\\\u0000 é"}',
}


def shortest(value: float) -> str:
    return str(value).removesuffix(".0")


def test_a_column_of_n_characters_holds_n_whatever_their_bytes(target: Target) -> None:
    """Domains, and domains on domains, count as what they stand on."""
    target.execute("CREATE DOMAIN short AS varchar(9)", "CREATE DOMAIN shorter AS short CHECK (value <> '')")
    model = Model(
        "things", "", (ID, Column("value", Kind.TEXT, "TEXT")), ("id",), None, EVENTS.query, EVENTS.fingerprints
    )
    declarations = ["varchar(9)", "char(9)", "short", "shorter"]
    made = [creation(f"t{n}", "id bigint", f"value {declared}") for n, declared in enumerate(declarations)]
    target.execute(*itertools.chain.from_iterable(made))
    with target.resource().session() as session:
        for n in range(len(declarations)):
            destination = Destination(None, target.schema, f"t{n}")
            load_by(session, destination, model, {"id": 1, "value": "🦔" * 9}, {"id": 2, "value": None})
            with pytest.raises(DestinationError, match="Column value of"):
                load_by(session, destination, model, {"id": 1, "value": "🦔" * 10})
            landed = session.rows(f"SELECT value::text FROM {destination.qualified} ORDER BY id", doing="reading")
            assert landed == [("🦔" * 9,), (None,)]


# Column, the type that a table has for it, the model.
CANNOT_HOLD: list[tuple[str, str, Model]] = [
    ("team_id", "double precision", EVENTS),
    ("team_id", "real", EVENTS),
    ("team_id", "boolean", EVENTS),
    ("timestamp", "date", EVENTS),
    ("timestamp", "time", EVENTS),
    ("timestamp", "text", EVENTS),
    ("timestamp", "bigint", EVENTS),
    ("event", "integer", EVENTS),
    ("event", "jsonb", EVENTS),
    ("event", "bytea", EVENTS),
    ("event", "mood", EVENTS),
    ("event", '"char"', EVENTS),
    ("event", "name", EVENTS),
    ("event", "text[]", EVENTS),
    ("ip", "inet", EVENTS),
    ("properties", "jsonb[]", EVENTS),
    ("properties", "pair", EVENTS),
    ("person_version", "real", PERSONS),
    ("is_deleted", "integer", PERSONS),
    ("is_deleted", "text", PERSONS),
    ("urls", "text", SESSIONS),
    ("urls", "jsonb", SESSIONS),
    ("urls", "integer[]", SESSIONS),
    ("vitals_lcp", "real", SESSIONS),
    ("vitals_lcp", "numeric", SESSIONS),
    ("vitals_lcp", "integer", SESSIONS),
    ("vitals_lcp", "interval", SESSIONS),
    ("event", "int4range", EVENTS),
]
NEEDED = {
    "events": ["uuid text"],
    "persons": ["team_id int", "distinct_id text", "person_distinct_id_version int", "person_version int"],
    "sessions": ["team_id int", "session_id text", "end_timestamp timestamptz"],
}


def test_a_type_that_cannot_hold_the_values_is_refused_before_a_row_is_sent(target: Target) -> None:
    statements = ["CREATE TYPE mood AS ENUM ('ok')", "CREATE TYPE pair AS (a text, b text)"]
    for n, (column, declared, model) in enumerate(CANNOT_HOLD):
        needed = [part for part in NEEDED[model.name] if not part.startswith(f"{column} ")]
        key = [f"PRIMARY KEY ({', '.join(model.key)})"] if model.merge else []
        statements += creation(f"t{n}", *needed, f"{quoted(column)} {declared}", *key)
    target.execute(*statements)
    with target.resource().session() as session:
        for n, (column, _, model) in enumerate(CANNOT_HOLD):
            with pytest.raises(DestinationError) as refused:
                tables.ensure(session, Destination(None, target.schema, f"t{n}"), model)
            [expected_type] = [source.postgres_type for source in model.columns if source.name == column]
            message = str(refused.value)
            assert f'Column {column} of "{target.schema}"."t{n}" is ' in message
            assert f"cannot hold the export's {expected_type}." in message
            assert f'ALTER COLUMN "{column}" TYPE {expected_type} USING' in message


# A key's or a version's kind, the type that a table has for it, and the type that the remedy gives; None if none helps the
# rows that are there.
BLURS: list[tuple[Kind, str, str, bool]] = [
    (Kind.TEXT, "citext", "TEXT", True),
    (Kind.TEXT, "char(9)", "TEXT", False),
    (Kind.TEXT, "any_text", '{}.any_text COLLATE "default"', True),
    (Kind.TEXT, "text COLLATE any_case", 'text COLLATE "default"', True),
    (Kind.INTEGER, "varchar(20) COLLATE any_case", 'character varying(20) COLLATE "default"', True),
    (Kind.TIMESTAMP, "timestamptz(0)", "TIMESTAMP WITH TIME ZONE", False),
    (Kind.TIMESTAMP, "timestamp(5)", "TIMESTAMP", False),
    (Kind.TIMESTAMP, "on_the_second", "TIMESTAMP WITH TIME ZONE", False),
]
SHARP: list[tuple[Kind, str]] = [
    (Kind.TEXT, 'varchar(9) COLLATE "en-x-icu"'),
    (Kind.TEXT, "uuid"),
    (Kind.INTEGER, "citext"),
    (Kind.INTEGER, "char(20)"),
    (Kind.INTEGER, "numeric(20, 0)"),
    (Kind.TIMESTAMP, "timestamptz(6)"),
    (Kind.TIMESTAMP, "timestamp"),
    (Kind.DATE, "date"),
    (Kind.FLOAT, "double precision"),
]


@pytest.mark.parametrize("role", ["a key", "a key of a merge", "a version"])
def test_a_column_by_which_rows_are_compared_tells_apart_what_differs_at_the_source(role: str, target: Target) -> None:
    target.execute(
        "CREATE EXTENSION IF NOT EXISTS citext SCHEMA pg_catalog",
        "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        "CREATE DOMAIN any_text AS text COLLATE any_case",
        "CREATE DOMAIN on_the_second AS timestamptz(0)",
    )
    blurs = [*BLURS]
    [(version,)] = target.rows("SELECT current_setting('server_version_num')::int")
    if version >= 150000:
        blurs.append((Kind.INTEGER, "numeric(10, -2)", "NUMERIC", False))
    types_of = [*((kind, type_) for kind, type_, *_ in blurs), *SHARP]
    key, merge = ("id",) if role == "a version" else ("id", "value"), Merge(("value",)) if role == "a version" else None
    if role == "a key of a merge":
        merge = Merge(("other",))
    target.execute(
        *itertools.chain.from_iterable(
            creation(
                f"t{n}", "id bigint", f"value {type_}", f"plain {type_}", "other bigint", f"UNIQUE ({', '.join(key)})"
            )
            for n, (_, type_) in enumerate(types_of)
        )
    )
    with target.resource().session() as session:
        for n, (kind, type_) in enumerate(types_of):
            columns = (
                ID,
                Column("value", kind, "TEXT"),
                Column("plain", kind, "TEXT"),
                Column("other", Kind.INTEGER, "BIGINT"),
            )
            model = Model("things", "", columns, key, merge, EVENTS.query, EVENTS.fingerprints)
            table = f'"{target.schema}"."t{n}"'

            def inspect() -> None:
                tables.inspect(session, Destination(None, target.schema, f"t{n}"), model)  # noqa: B023 - called here

            if n >= len(blurs):
                inspect()
                continue
            _, _, remedy, helps_rows = blurs[n]
            with pytest.raises(DestinationError, match=f"Column value of {table} is .*rows that differ at the source"):
                inspect()
            target.execute(f"INSERT INTO t{n} (id) VALUES (1)")
            with pytest.raises(DestinationError) as refused:
                inspect()
            if not helps_rows:
                assert "ALTER TABLE" not in str(refused.value)
                assert "set the export's `table` to another table" in str(refused.value)
                target.execute(f"DELETE FROM t{n}")
                with pytest.raises(DestinationError) as refused:
                    inspect()
            [statement] = re.findall("Run as its owner: (.*;)", str(refused.value))
            assert statement == f'ALTER TABLE {table} ALTER COLUMN "value" TYPE {remedy.format(target.schema)};', type_
            target.execute(statement)
            inspect()


def test_a_uuid_by_which_rows_are_compared_has_one_spelling(target: Target) -> None:
    """The others are set aside: two that Postgres takes for equal would be one row."""
    create(target, "events", "uuid uuid", "event text", "distinct_id uuid", "person_id uuid")
    small, capitals = UUID.format("a"), UUID.format("A")
    assert load(target, EVENTS, event(distinct_id=small, person_id=capitals)) == Merged(1, 0)
    with pytest.raises(DestinationError, match='ALTER COLUMN "distinct_id" TYPE TEXT;') as refused:
        load(target, EVENTS, event(distinct_id=capitals))
    target.execute("ALTER TABLE " + str(refused.value).partition("ALTER TABLE ")[2].partition(";")[0])
    assert load(target, EVENTS, event(distinct_id=small), event(distinct_id=capitals), staged=True) == Merged(1, 0)


def test_a_merges_key_that_is_null_is_set_aside_whatever_the_tables_column_allows(target: Target) -> None:
    columns = (ID, Column("name", Kind.TEXT, "TEXT"), Column("version", Kind.INTEGER, "BIGINT"))
    model = Model("things", "", columns, ("id", "name"), Merge(("version",)), EVENTS.query, EVENTS.fingerprints)
    for table, key in (("unique_ones", "UNIQUE (id, name)"), ("primary_ones", "PRIMARY KEY (id, name)")):
        create(target, table, "id bigint, name text, version bigint", key)
        with pytest.raises(DestinationError, match="by which rows are merged, and cannot be NULL"):
            load(target, model, {"id": 1, "name": None, "version": 1}, table=table)


# What is held, in ascending order as ClickHouse sorts them.
VERSIONS: list[tuple[Kind, str, list[Any]]] = [
    (
        Kind.TEXT,
        'text COLLATE "en-x-icu"',
        [None, "", " ", "1", "10", "9", "B", "a", "b", "\u00e4", "\u4e00", "\U0001f994"],
    ),
    (Kind.TEXT, "uuid", [None, UUID.format(1), UUID.format("a"), "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    (Kind.FLOAT, "double precision", [None, float("-inf"), -1.5, 0.0, 1e-300, 2.0, 10.0, float("inf")]),
    (Kind.INTEGER, 'text COLLATE "en-x-icu"', [None, -10, -9, 0, 9, 10]),
    (Kind.INTEGER, "char(20)", [None, -10, -9, 0, 9, 10]),
    (Kind.BOOLEAN, "boolean", [None, False, True]),
    (Kind.DATE, "date", [None, date(1, 1, 1), date(2026, 1, 1)]),
    (Kind.TIMESTAMP, "timestamptz", [None, MOMENT, MOMENT + timedelta(microseconds=1)]),
]


def test_versions_are_ordered_as_clickhouse_orders_them(target: Target) -> None:
    for n, (kind, type_, values) in enumerate(VERSIONS):
        columns = (Column("id", Kind.INTEGER, "BIGINT"), Column("version", kind, "TEXT"))
        model = Model("things", "", columns, ("id",), Merge(("version",)), EVENTS.query, EVENTS.fingerprints)
        create(target, f"t{n}", "id bigint PRIMARY KEY", f"version {type_}")
        pairs = list(itertools.product(values, values))
        load(target, model, *({"id": i, "version": held} for i, (held, _) in enumerate(pairs)), table=f"t{n}")
        places = dict(target.rows(f"SELECT id, ctid::text FROM t{n}"))
        load(target, model, *({"id": i, "version": new} for i, (_, new) in enumerate(pairs)), table=f"t{n}")
        replaced = {i for i, place in target.rows(f"SELECT id, ctid::text FROM t{n}") if places[i] != place}
        for i, (held, new) in enumerate(pairs):
            assert (i in replaced) is (values.index(new) > values.index(held)), (type_, held, new)


def test_a_version_that_is_no_number_is_as_low_as_none(target: Target) -> None:
    columns = (ID, Column("version", Kind.FLOAT, "DOUBLE PRECISION"))
    model = Model("things", "", columns, ("id",), Merge(("version",)), EVENTS.query, EVENTS.fingerprints)
    assert load(target, model, {"id": 1, "version": float("nan")}) == Merged(1, 0)
    assert load(target, model, {"id": 1, "version": None}, {"id": 2, "version": 1.0}) == Merged(1, 1)
    assert load(target, model, {"id": 1, "version": -1.0}, {"id": 2, "version": float("nan")}) == Merged(0, 1)


def test_versions_compare_as_numbers_and_times_in_whatever_type_the_table_has(target: Target) -> None:
    create(
        target,
        "persons",
        "team_id numeric, distinct_id varchar(500), person_distinct_id_version text, person_version smallint",
        "UNIQUE (distinct_id, team_id)",
    )
    create(
        target,
        "sessions",
        "team_id smallint, session_id uuid, end_timestamp timestamp, urls varchar[]",
        "PRIMARY KEY (session_id, team_id)",
    )
    assert load(target, PERSONS, person(person_distinct_id_version=9)) == Merged(1, 0)
    assert load(target, PERSONS, person(person_distinct_id_version=10)) == Merged(0, 1)
    assert load(target, PERSONS, person(person_distinct_id_version=9)) == Merged(0, 0)
    session = {"team_id": 1, "session_id": UUID.format(1), "end_timestamp": MOMENT, "urls": ["a", None]}
    assert load(target, SESSIONS, session) == Merged(1, 0)
    assert load(target, SESSIONS, session) == Merged(0, 0)
    assert load(target, SESSIONS, session | {"urls": ["a"]}) == Merged(0, 1)


def test_json_that_has_no_equality_is_compared_all_the_same(target: Target) -> None:
    columns = (
        Column("id", Kind.INTEGER, "BIGINT"),
        Column("version", Kind.INTEGER, "BIGINT"),
        Column("value", Kind.JSON, "JSONB"),
    )
    model = Model("things", "", columns, ("id",), Merge(("version",)), EVENTS.query, EVENTS.fingerprints)
    create(target, "things", "id bigint PRIMARY KEY", "version bigint", "value json")
    row = {"id": 1, "version": 1, "value": "{}"}
    assert load(target, model, row) == Merged(1, 0)
    assert load(target, model, row) == Merged(0, 0)
    assert load(target, model, row | {"value": "[]"}) == Merged(0, 1)


def test_a_time_without_zone_is_the_time_in_utc_whatever_the_roles_zone(target: Target) -> None:
    target.sandbox.postgres.execute("ALTER ROLE exporter SET timezone = 'Asia/Tokyo'")
    try:
        create(target, "events", "uuid text", '"timestamp" timestamp', "created_at timestamptz")
        load(target, EVENTS, event(timestamp=MOMENT, created_at=MOMENT))
    finally:
        target.sandbox.postgres.execute("ALTER ROLE exporter RESET timezone")
    assert target.rows('SELECT "timestamp", created_at FROM events') == [(MOMENT.replace(tzinfo=None), MOMENT)]
