"""Which row stays when both sides have one, that the others are left alone, and that merges wait for each other."""

import itertools
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from pg_exports.errors import DestinationError
from pg_exports.models import Column, Kind, Model
from pg_exports.models.events import EVENTS
from pg_exports.models.persons import PERSONS
from pg_exports.models.sessions import SESSIONS
from pg_exports.postgres import merge
from pg_exports.postgres import table as tables
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination
from pg_exports_tests.conftest import Target
from pg_exports_tests.postgres.test_ingest import MOMENT, Row, copy, create, event, load, load_by, person

Versions = tuple[int | None, int | None]

# (mapping's version, person's version) in Postgres, incoming, and whether the incoming one replaces it.
PERSON_RULE: list[tuple[Versions, Versions, bool]] = [
    ((1, 1), (1, 1), True),
    ((1, 1), (1, 2), True),
    ((1, 2), (1, 1), False),
    ((1, 9), (2, 1), True),
    ((2, 1), (1, 9), False),
    ((2, 9), (10, 1), True),
    ((0, 0), (0, 1), True),
    ((-1, 0), (0, 0), True),
    ((None, None), (None, None), True),
    ((None, None), (None, 0), True),
    ((None, None), (0, None), True),
    ((None, 5), (0, 0), True),
    ((0, None), (0, 0), True),
    ((0, None), (0, -5), True),
    ((0, 0), (0, None), False),
    ((0, 0), (None, 9), False),
    ((0, None), (0, None), True),
    ((1, None), (None, 9), False),
    ((2**31 - 1, 1), (1, 2**31 - 1), False),
]


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_person_is_replaced_by_greater_versions_compared_in_order(target: Target, partitioned: bool) -> None:
    if partitioned:
        columns = ", ".join(f'"{column.name}" {column.postgres_type}' for column in PERSONS.columns)
        create(target, "persons", columns, "PRIMARY KEY (team_id, distinct_id)", after="PARTITION BY HASH (team_id)")
        target.execute("CREATE TABLE p0 PARTITION OF persons FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    load(target, PERSONS, *(at(n, held, "held") for n, (held, _, _) in enumerate(PERSON_RULE)))
    merged = load(target, PERSONS, *(at(n, incoming, "incoming") for n, (_, incoming, _) in enumerate(PERSON_RULE)))
    landed = dict(target.rows("SELECT distinct_id, person_id FROM persons"))
    for n, (held, incoming, replaces) in enumerate(PERSON_RULE):
        assert landed[str(n)] == ("incoming" if replaces else "held"), (held, incoming)
    assert merged == Merged(0, sum(replaces for *_, replaces in PERSON_RULE))


def at(n: int, versions: Versions, person_id: str) -> Row:
    return person(str(n), person_distinct_id_version=versions[0], person_version=versions[1], person_id=person_id)


def test_of_equal_versions_the_one_that_was_read_later_replaces_the_other(target: Target) -> None:
    load(target, PERSONS, person())
    assert load(target, PERSONS, person(properties='{"b": 2}', person_id="other")) == Merged(0, 1)
    assert load(target, PERSONS, person(properties=None, person_version=2)) == Merged(0, 1)
    assert target.rows("SELECT properties, person_version FROM persons") == [(None, 2)]


def test_one_team_or_another_distinct_id_is_another_row(target: Target) -> None:
    assert load(target, PERSONS, person("a"), person("A"), person("a "), person(""), person("a", team_id=2)) == Merged(
        5, 0
    )
    assert load(target, PERSONS, person("a", team_id=2, person_version=2)) == Merged(0, 1)


SECOND = timedelta(seconds=1)

# What is in Postgres, what comes in, and whether it replaces.
SESSION_RULE: list[tuple[datetime | None, datetime | None, dict[str, Any], bool]] = [
    (MOMENT, MOMENT, {}, False),
    (MOMENT, MOMENT + SECOND, {}, True),
    (MOMENT, MOMENT - SECOND, {}, False),
    (MOMENT, MOMENT, {"pageview_count": 2}, True),
    (MOMENT, MOMENT, {"urls": ["a"]}, True),
    (MOMENT, MOMENT, {"urls": None}, True),
    (MOMENT, MOMENT, {"urls": ["b", "a", None]}, True),
    (MOMENT, MOMENT, {"channel_type": ""}, True),
    (MOMENT, MOMENT, {"vitals_lcp": float("nan")}, True),
    (MOMENT, MOMENT - SECOND, {"pageview_count": 2}, False),
    (MOMENT, MOMENT + timedelta(microseconds=1), {}, True),
    (None, MOMENT, {}, True),
    (MOMENT, None, {"pageview_count": 2}, False),
    (None, None, {"pageview_count": 2}, True),
    (None, None, {}, False),
]


def test_a_session_is_replaced_when_it_ends_no_earlier_and_anything_differs(target: Target) -> None:
    same = {"team_id": 1, "urls": ["a", "b", None], "pageview_count": 1}
    held = [same | {"session_id": str(n), "end_timestamp": end} for n, (end, *_) in enumerate(SESSION_RULE)]
    incoming = [
        same | {"session_id": str(n), "end_timestamp": end} | changes
        for n, (_, end, changes, _) in enumerate(SESSION_RULE)
    ]
    assert load(target, SESSIONS, *held) == Merged(len(held), 0)
    places = dict(target.rows("SELECT session_id, ctid::text FROM sessions"))
    merged = load(target, SESSIONS, *incoming)
    after = dict(target.rows("SELECT session_id, ctid::text FROM sessions"))
    for n, (end, new_end, changes, replaces) in enumerate(SESSION_RULE):
        assert (places[str(n)] != after[str(n)]) is replaces, (end, new_end, changes)
    assert merged == Merged(0, sum(replaces for *_, replaces in SESSION_RULE))


def test_a_session_whose_every_value_is_the_same_is_not_written_again_nan_included(target: Target) -> None:
    row = {"team_id": 1, "session_id": "s", "end_timestamp": MOMENT, "vitals_lcp": float("nan"), "urls": []}
    assert load(target, SESSIONS, row) == Merged(1, 0)
    assert load(target, SESSIONS, row) == Merged(0, 0)


@pytest.mark.parametrize("changes", [{}, {"person_version": 0}], ids=["the same", "older"])
def test_rows_that_stay_are_neither_written_nor_locked(changes: dict[str, object], target: Target) -> None:
    people = [person(str(n)) for n in range(100)]
    load(target, PERSONS, *people)
    where = "SELECT distinct_id, xmin::text, xmax::text, ctid::text FROM persons ORDER BY 1"
    before = target.rows(where)
    assert load(target, PERSONS, *(row | changes for row in people), person("new")) == Merged(1, 0)  # type: ignore[operator]
    assert [row for row in target.rows(where) if row[0] != "new"] == before


def test_events_that_are_there_are_told_by_every_column_of_their_identity_that_the_table_has(target: Target) -> None:
    load(target, EVENTS, event(1))
    others = [event(1, event="other"), event(1, distinct_id="other"), event(1, team_id=2), event(2)]
    assert load(target, EVENTS, event(1), *others, staged=True) == Merged(4, 0)
    create(target, "of_one_team", "uuid uuid, event text, distinct_id text")
    load(target, EVENTS, event(1), table="of_one_team")
    assert load(
        target, EVENTS, event(1), event(1, event="other"), event(2), table="of_one_team", staged=True
    ) == Merged(2, 0)


def test_a_row_without_a_team_is_taken_for_the_teams(target: Target) -> None:
    load(target, EVENTS, event(1), event(2), event(3, distinct_id="other"))
    target.execute("ALTER TABLE events DROP COLUMN team_id", "ALTER TABLE events ADD COLUMN team_id integer")
    assert load(target, EVENTS, *(event(n) for n in (1, 2, 3, 4)), staged=True) == Merged(2, 0)
    assert load(target, EVENTS, *(event(n, team_id=2) for n in (1, 3)), staged=True) == Merged(1, 0)
    assert target.rows("SELECT team_id, count(*) FROM events GROUP BY 1 ORDER BY 1") == [(1, 2), (2, 1), (None, 3)]


@pytest.mark.parametrize("gone", [["distinct_id"], ["event"], ["event", "distinct_id", "team_id"]], ids=str)
def test_a_row_that_may_be_one_of_the_sources_or_not_is_an_error_that_counts_them(
    gone: list[str], target: Target
) -> None:
    load(target, EVENTS, *(event(n) for n in (1, 2, 3, 9)))
    for name in gone:
        target.execute(f"ALTER TABLE events DROP COLUMN {name}", f"ALTER TABLE events ADD COLUMN {name} text")
    # What no such row can be is brought in as ever, and what a whole row is, is known.
    load(target, EVENTS, event(3))
    kept = "distinct_id" if "distinct_id" not in gone else "event"
    assert load(target, EVENTS, event(3), event(4), staged=True) == Merged(1, 0)
    if kept not in gone:
        assert load(target, EVENTS, event(1, **{kept: "other"}), staged=True) == Merged(1, 0)
    before = target.rows("SELECT * FROM events")
    with pytest.raises(DestinationError) as refused:
        load(target, EVENTS, *(event(n) for n in (1, 2, 3, 4, 5)), staged=True)
    assert "has rows in which event or distinct_id is NULL" in str(refused.value)
    assert "They have the uuid of 2 rows at the source, and whether they are these cannot be told." in str(
        refused.value
    )
    assert target.rows("SELECT * FROM events") == before
    target.execute(
        "UPDATE events SET event = '$pageview', distinct_id = 'd' WHERE event IS NULL OR distinct_id IS NULL"
    )
    assert load(target, EVENTS, *(event(n) for n in (1, 2, 3, 4, 5)), staged=True) == Merged(1, 0)


KEYS: list[tuple[Kind, str, object]] = [
    (Kind.TEXT, "TEXT", "a"),
    (Kind.TEXT, "VARCHAR(9)", ""),
    (Kind.TEXT, "UUID", "0192b0ad-5f0a-7c1e-9a73-000000000001"),
    (Kind.INTEGER, "BIGINT", 0),
    (Kind.INTEGER, "SMALLINT", 1),
    (Kind.INTEGER, "NUMERIC", 1),
    (Kind.INTEGER, "TEXT", 1),
    (Kind.FLOAT, "DOUBLE PRECISION", float("nan")),
    (Kind.BOOLEAN, "BOOLEAN", False),
    (Kind.DATE, "DATE", MOMENT.date()),
    (Kind.TIMESTAMP, "TIMESTAMP WITH TIME ZONE", MOMENT),
    (Kind.TIMESTAMP, "TIMESTAMP", MOMENT),
]


@pytest.mark.parametrize("with_trigger", [False, True], ids=["", "with a trigger"])
def test_where_null_is_a_value_of_a_key_its_rows_are_recognised_in_each_type(
    with_trigger: bool, target: Target
) -> None:
    target.execute("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    for n, (kind, type_, value) in enumerate(KEYS):
        columns = (Column("a", kind, type_), Column("b", Kind.INTEGER, "BIGINT"), Column("c", Kind.TEXT, "TEXT"))
        for key in (("a",), ("a", "b"), ("b", "c", "a")):
            table = f"t{n}_{''.join(key)}"
            model = Model(table, "", columns, key, None, EVENTS.query, EVENTS.fingerprints, key_may_be_null=True)
            values: dict[str, list[object]] = {"a": [value, None], "b": [1, None], "c": ["", None]}
            rows = [dict(zip(key, each, strict=True)) for each in itertools.product(*(values[name] for name in key))]
            assert load(target, model, *rows[::2]) == Merged(len(rows[::2]), 0)
            if with_trigger:
                target.execute(f"CREATE TRIGGER kept BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION keep()")
            assert load(target, model, *rows, staged=True) == Merged(len(rows) - len(rows[::2]), 0)
            assert load(target, model, *rows, staged=True) == Merged(0, 0)


def test_rows_that_a_trigger_lets_in_under_another_key_count_as_missing_and_not_as_inserted(target: Target) -> None:
    create(target, "events", "uuid text, event text, distinct_id text, ip text")
    target.execute(
        "CREATE FUNCTION lower_case() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.distinct_id = lower(NEW.distinct_id); NEW.ip = NULL; RETURN NEW; END'",
        "CREATE TRIGGER lower_case BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION lower_case()",
    )
    assert load(target, EVENTS, event(1, ip="1.1.1.1"), staged=True) == Merged(1, 0)
    rows = [event(1), event(2), *(event(n, distinct_id="D") for n in (3, 4))]
    assert load(target, EVENTS, *rows, staged=True) == Merged(1, 0, 2)


def test_no_staging_table_is_left_after_a_merge_or_a_failure(target: Target) -> None:
    load(target, PERSONS, person())
    with target.resource().session() as session:
        table = tables.inspect(session, Destination(None, target.schema, "persons"), PERSONS)
        with (
            pytest.raises(DestinationError, match="division by zero"),
            session.transaction(),
            merge.staging_table(session, table),
        ):
            session.execute("SELECT 1 / 0", doing="dividing")
    assert target.rows("SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()") == [("persons",)]


def merged(target: Target, session: Session, people: list[Row], staged: threading.Barrier) -> Merged:
    table = tables.inspect(session, Destination(None, target.schema, "persons"), PERSONS)
    with session.transaction(), merge.staging_table(session, table) as staging:
        read_since = merge.snapshot(session)
        copy(session, table, staging, *people)
        staged.wait(timeout=30)
        return merge.merge(session, table, staging, read_since)


def test_two_merges_of_the_same_rows_in_opposite_orders_wait_for_each_other(target: Target) -> None:
    """Both touch held rows and bring the same new ones; the second to come finds the first one's rows."""
    names = [f"{n:05}" for n in range(3_000)]
    load(target, PERSONS, *(person(name) for name in names[::2]))
    staged = threading.Barrier(2)
    outcomes: list[Merged | BaseException] = []

    def merge_in(order: Iterator[str], version: int) -> None:
        try:
            with target.resource().session() as session:
                outcomes.append(
                    merged(target, session, [person(name, person_version=version) for name in order], staged)
                )
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            outcomes.append(error)

    threads = [
        threading.Thread(target=merge_in, args=(iter(names), 2)),
        threading.Thread(target=merge_in, args=(reversed(names), 3)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(outcome, Merged) for outcome in outcomes), outcomes
    written = [(outcome.inserted, outcome.updated) for outcome in outcomes if isinstance(outcome, Merged)]
    assert sum(inserted for inserted, _ in written) == 1_500
    assert target.rows("SELECT person_version, count(*) FROM persons GROUP BY 1") == [(3, 3_000)]


def test_a_merge_has_memory_to_look_rows_up_by_and_gives_it_back(target: Target) -> None:
    with target.resource().session() as session:

        def hash_memory() -> float:
            sql = (
                "SELECT current_setting('hash_mem_multiplier')::float8"
                " * pg_size_bytes(current_setting('work_mem')) / 1024 / 1024"
            )
            [(megabytes,)] = session.rows(sql, doing="reading a setting")
            return float(str(megabytes))

        before = hash_memory()
        for work_memory, megabytes in (("1MB", 128), ("4MB", 128), ("64kB", 62.5), ("1GB", 1024 * before / 4)):
            with session.transaction():
                session.execute(f"SET LOCAL work_mem = '{work_memory}'", doing="setting it")
                load_by(session, Destination(None, target.schema, "persons"), PERSONS, person(work_memory))
                assert hash_memory() == megabytes
            assert hash_memory() == before
    assert target.count("persons") == 4


def test_rows_that_another_run_brings_after_the_look_into_an_empty_table_keep_to_the_rule(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(target, PERSONS, person("older", person_version=1), person("newer", person_version=3))
    monkeypatch.setattr(merge, "_is_empty", lambda session, table: True)
    rows = [person(name, person_version=2) for name in ("older", "newer", "new")]
    assert load(target, PERSONS, *rows) == Merged(inserted=1, updated=1)
    assert dict(target.rows("SELECT distinct_id, person_version FROM persons")) == {"older": 2, "newer": 3, "new": 2}
