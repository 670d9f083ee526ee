"""Rows that Postgres refuses for what they hold: each is found, and no innocent one with it."""

import json
import random
from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pytest

from pg_exports.errors import DestinationError
from pg_exports.interval import OnBadRows
from pg_exports.models.events import EVENTS
from pg_exports.models.persons import PERSONS
from pg_exports.postgres import ingest
from pg_exports.postgres import table as tables
from pg_exports.postgres.bad_rows import BadRow
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Target
from pg_exports_tests.postgres.test_ingest import Row, event, frame, load, person

RAISES_SEVENS = """
CREATE FUNCTION no_sevens() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF NEW.distinct_id LIKE '%7' THEN RAISE 'no sevens'; END IF; RETURN NEW; END $$
"""
COLUMNS = "uuid text, distinct_id text, team_id integer, event text"

# How the table is made, of 1,100 rows (their number is the distinct_id) the ones that it refuses, and the words.
REFUSALS: dict[str, tuple[Sequence[str], set[int], str]] = {
    "a foreign key": (
        [
            "CREATE TABLE people (distinct_id text PRIMARY KEY)",
            "INSERT INTO people SELECT n::text FROM generate_series(0, 1099) AS n WHERE n NOT IN (0, 5, 6, 1099)",
            f"CREATE TABLE events ({COLUMNS}, FOREIGN KEY (distinct_id) REFERENCES people)",
        ],
        {0, 5, 6, 1099},
        "violates foreign key constraint",
    ),
    "a foreign key that is checked at COMMIT": (
        [
            "CREATE TABLE people (distinct_id text PRIMARY KEY)",
            "INSERT INTO people SELECT n::text FROM generate_series(0, 1099) AS n WHERE n <> 700",
            f"CREATE TABLE events ({COLUMNS}, FOREIGN KEY (distinct_id) REFERENCES people DEFERRABLE INITIALLY DEFERRED)",
        ],
        {700},
        "violates foreign key constraint",
    ),
    "a row too big for a page": (
        [
            # 1,300 columns of 8 bytes, which one row has and the others have not.
            f"CREATE TABLE events ({COLUMNS}, "
            + ", ".join(
                f"c{n} bigint GENERATED ALWAYS AS (CASE WHEN distinct_id = '707' THEN {n} END) STORED"
                for n in range(1300)
            )
            + ")"
        ],
        {707},
        "row is too big",
    ),
    "an index": (
        [
            f"CREATE TABLE events ({COLUMNS})",
            "CREATE FUNCTION long(text) RETURNS text LANGUAGE sql IMMUTABLE AS "
            "$$ SELECT string_agg(md5($1 || n), '') FROM generate_series(1, CASE $1 WHEN '707' THEN 150 ELSE 1 END) AS n $$",
            "CREATE INDEX ON events (long(distinct_id))",
        ],
        {707},
        "index row size",
    ),
    "a unique index, of two rows the second": (
        [f"CREATE TABLE events ({COLUMNS})", "CREATE UNIQUE INDEX ON events ((distinct_id::integer % 1000))"],
        set(range(1000, 1100)),
        "duplicate key",
    ),
    "a unique constraint that is checked at COMMIT": (
        [
            f"CREATE TABLE events ({COLUMNS}, part integer GENERATED ALWAYS AS (distinct_id::integer % 1090) STORED, "
            "UNIQUE (part) DEFERRABLE INITIALLY DEFERRED)"
        ],
        set(range(1090, 1100)),
        "duplicate key",
    ),
    "an exclusion constraint": (
        [
            f"CREATE TABLE events ({COLUMNS}, span int4range "
            "GENERATED ALWAYS AS (int4range(distinct_id::integer % 1095, distinct_id::integer % 1095 + 1)) STORED, "
            "EXCLUDE USING gist (span WITH &&))"
        ],
        set(range(1095, 1100)),
        "exclusion constraint",
    ),
    "a CHECK of a partition, and a partition that is missing": (
        [
            f"CREATE TABLE events ({COLUMNS}) PARTITION BY HASH (distinct_id)",
            "CREATE TABLE half PARTITION OF events (CHECK (distinct_id NOT IN ('3', '500', '501')))"
            " FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        ],
        {3, 500, 501},
        "check constraint",
    ),
    "a trigger before each row": (
        [
            f"CREATE TABLE events ({COLUMNS})",
            RAISES_SEVENS,
            "CREATE TRIGGER before BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION no_sevens()",
        ],
        {n for n in range(1100) if n % 10 == 7},
        "no sevens",
    ),
    "a trigger after each row": (
        [
            f"CREATE TABLE events ({COLUMNS})",
            RAISES_SEVENS.replace("'%7'", "'%77'"),
            "CREATE TRIGGER after AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION no_sevens()",
        ],
        {n for n in range(1100) if n % 100 == 77},
        "no sevens",
    ),
    "a constraint trigger that fires at COMMIT": (
        [
            f"CREATE TABLE events ({COLUMNS})",
            RAISES_SEVENS.replace("'%7'", "'77'"),
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON events INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION no_sevens()",
        ],
        {77},
        "no sevens",
    ),
}


def copy(
    session: Session, destination: Destination, rows: Sequence[Row], on_bad_rows: OnBadRows = "repair"
) -> tuple[set[str], list[BadRow]]:
    """The rows in one piece into the table: the distinct_ids of those that went in, and those that were set aside."""
    table = tables.inspect(session, destination, EVENTS)
    aside: list[BadRow] = []
    went_in: list[str] = []

    def landed(good: pl.DataFrame, _: pl.Series) -> None:
        went_in.extend(good["distinct_id"])

    with session.transaction():
        ingest.copy_frames(session, table, destination.table, [frame(EVENTS, *rows)], on_bad_rows, aside.extend, landed)
    there = [str(value) for (value,) in session.rows(f"SELECT distinct_id FROM {table.qualified}", doing="reading")]
    assert sorted(there) == sorted(went_in)
    return set(went_in), aside


def numbered(count: int) -> list[Row]:
    return [event(1, distinct_id=str(n)) for n in range(count)]


def create(target: Target, *statements: str) -> Destination:
    target.execute(*statements, f"GRANT INSERT, SELECT, UPDATE ON events TO {ROLE}")
    return Destination(None, target.schema, "events")


@pytest.mark.parametrize("name", REFUSALS)
def test_each_row_that_postgres_refuses_is_set_aside_and_every_other_one_lands(name: str, target: Target) -> None:
    statements, refused, reason = REFUSALS[name]
    destination = create(target, *statements)
    with target.resource().session() as session:
        went_in, aside = copy(session, destination, numbered(1_100))
    assert {int(json.loads(bad.row)["distinct_id"]) for bad in aside} == refused
    assert {int(n) for n in went_in} == set(range(1_100)) - refused
    assert all(reason in str(bad.fault.words) for bad in aside)


@pytest.mark.parametrize("name", REFUSALS)
def test_with_fail_the_first_row_that_postgres_refuses_is_named(name: str, target: Target) -> None:
    statements, refused, _ = REFUSALS[name]
    destination = create(target, *statements)
    with target.resource().session() as session:
        with pytest.raises(DestinationError, match="Postgres refuses the row") as failed:
            copy(session, destination, numbered(1_100), "fail")
        assert session.rows(f"SELECT FROM {destination.qualified}", doing="reading") == []
    assert any(json.dumps({"distinct_id": str(n)})[1:-1] in str(failed.value) for n in refused)


def test_a_foreign_key_that_refuses_every_row_costs_about_one_copy_a_row(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[str] = []
    send = Session.copy

    def counted(self: Session, schema: str, table: str, batches: pa.RecordBatchReader) -> int:
        copies.append(table)
        return send(self, schema, table, batches)

    monkeypatch.setattr(Session, "copy", counted)
    destination = create(
        target, "CREATE TABLE people (id text PRIMARY KEY)", f"CREATE TABLE events ({COLUMNS}, {REFERS_TO_PEOPLE})"
    )
    with target.resource().session() as session:
        went_in, aside = copy(session, destination, numbered(200))
    assert (went_in, len(aside)) == (set(), 200)
    assert len(copies) < 220


REFERS_TO_PEOPLE = "FOREIGN KEY (distinct_id) REFERENCES people"


@pytest.mark.parametrize("moment", ["BEFORE", "AFTER"])
def test_a_trigger_that_refuses_every_statement_stops_the_interval_and_sets_no_row_aside(
    moment: str, target: Target
) -> None:
    destination = create(
        target,
        f"CREATE TABLE events ({COLUMNS}, CHECK (distinct_id <> '0'))",
        "CREATE FUNCTION closed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'closed on Sundays'; END $$",
        f"CREATE TRIGGER closed {moment} INSERT ON events EXECUTE FUNCTION closed()",
    )
    with (
        target.resource().session() as session,
        pytest.raises(DestinationError, match="even a COPY of no rows: closed on Sundays"),
    ):
        copy(session, destination, numbered(100))


TREE = "uuid text PRIMARY KEY, distinct_id text, event text REFERENCES events"
ORPHANS_LAST: list[dict[str, object]] = [
    {"uuid": "child", "event": "parent", "distinct_id": "1"},
    {"uuid": "parent", "event": None, "distinct_id": "2"},
    {"uuid": "orphan", "event": "nobody", "distinct_id": "3"},
]


def test_a_foreign_key_of_a_table_to_itself_sets_no_child_aside_whose_parent_comes_later(target: Target) -> None:
    destination = create(target, f"CREATE TABLE events ({TREE})")
    with target.resource().session() as session:
        with pytest.raises(DestinationError, match=r"which refers to itself: .*events_event_fkey"):
            copy(session, destination, ORPHANS_LAST)
        assert copy(session, destination, ORPHANS_LAST[:2]) == ({"1", "2"}, [])


def test_a_tree_whose_key_is_deferred_may_have_its_parents_in_a_later_copy(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "COPY_BYTES", 1)
    destination = create(target, f"CREATE TABLE events ({TREE} DEFERRABLE INITIALLY DEFERRED)")
    with target.resource().session() as session:
        assert copy(session, destination, ORPHANS_LAST[:2]) == ({"1", "2"}, [])
        with pytest.raises(DestinationError, match=r"while committing: .*events_event_fkey"):
            copy(session, destination, ORPHANS_LAST[2:])


def test_of_two_rows_that_collide_one_lands(target: Target) -> None:
    destination = create(target, f"CREATE TABLE events ({COLUMNS}, UNIQUE (distinct_id))")
    with target.resource().session() as session:
        went_in, aside = copy(session, destination, [event(1), event(2), event(3, distinct_id="e")])
    assert went_in == {"d", "e"}
    [bad] = aside
    assert json.loads(bad.key)["uuid"] == event(2)["uuid"]


def test_refusals_of_all_kinds_among_each_other_are_told_from_good_rows(target: Target) -> None:
    generator = random.Random(1)
    destination = create(
        target,
        "CREATE TABLE people (distinct_id text PRIMARY KEY)",
        "INSERT INTO people SELECT n::text FROM generate_series(0, 5999) AS n",
        f"CREATE TABLE events ({COLUMNS}, properties jsonb, UNIQUE (uuid), CHECK (event <> 'no'), {REFERS_TO_PEOPLE})",
        RAISES_SEVENS.replace("distinct_id LIKE '%7'", "event = 'raise'"),
        "CREATE TRIGGER after AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION no_sevens()",
    )
    faults: list[Row] = [{"properties": "{"}, {"event": "no"}, {"event": "raise"}, {"distinct_id": "nobody"}]
    with target.resource().session() as session:
        for share in (0.01, 0.3, 1.0):
            bad = {n for n in range(300) if generator.random() < share}
            rows = [
                {**event(1, uuid=str(n), distinct_id=str(n)), **(generator.choice(faults) if n in bad else {})}
                for n in range(300)
            ]
            # A copy of a row that is in: the unique index refuses it.
            rows += [rows[n] for n in range(300) if n not in bad][:3]
            target.execute("DELETE FROM events")
            went_in, aside = copy(session, destination, rows)
            assert went_in == {str(n) for n in range(300) if n not in bad}
            assert len(aside) == len(rows) - len(went_in)


MERGED = {
    "a foreign key": ("FOREIGN KEY (person_id) REFERENCES people", "foreign key constraint"),
    "a foreign key checked at COMMIT": (
        "FOREIGN KEY (person_id) REFERENCES people DEFERRABLE INITIALLY DEFERRED",
        "foreign key constraint",
    ),
    "a unique index": ("UNIQUE (properties)", "unique constraint"),
    "an exclusion constraint": ("EXCLUDE (properties WITH =)", "exclusion constraint"),
    "a check": ("CHECK (distinct_id <> 'b')", "check constraint"),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_merge_that_postgres_refuses_fails_with_the_constraint_and_where_the_row_is_found(
    name: str, target: Target
) -> None:
    constraint, reason = MERGED[name]
    target.execute(
        "CREATE TABLE people (id text PRIMARY KEY)",
        "CREATE TABLE persons (team_id integer, distinct_id text, person_id text, properties jsonb,"
        " person_distinct_id_version integer, person_version integer, PRIMARY KEY (team_id, distinct_id),"
        f" {constraint})",
        f"GRANT INSERT, SELECT, UPDATE ON persons TO {ROLE}",
    )
    with pytest.raises(DestinationError, match=rf'violates {reason} ".*".*\nWhich row it was is in Postgres'):
        load(target, PERSONS, person("a"), person("b"))
    assert target.count("persons") == 0
