"""Persons in Postgres against persons in ClickHouse: the latest state of each distinct_id, whatever happens to it.

The reference is written in Python from the rows of the two source tables; of the model it takes nothing.
"""

import json
import uuid
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pg_exports.sandbox.sample_data import empty_hour
from pg_exports_tests.conftest import (
    SAMPLE_HOURS,
    TEAM,
    RunExport,
    Source,
    Target,
    materialise,
    partition_key,
)
from pg_exports_tests.models.comparison import Row, comparable, created_columns, differences, instant, landed_rows
from pg_exports_tests.source_rows import HOUR, MICROSECOND, export_of, mapping, person

DEFAULT = {
    "team_id": "INTEGER",
    "distinct_id": "TEXT",
    "person_id": "TEXT",
    "properties": "JSONB",
    "person_distinct_id_version": "INTEGER",
    "person_version": "INTEGER",
    "created_at": "TIMESTAMP WITH TIME ZONE",
}
OPTIONAL = {"is_deleted": "BOOLEAN"}
COLUMNS = DEFAULT | OPTIONAL
ADD_OPTIONAL = "ALTER TABLE persons ADD COLUMN is_deleted boolean"
SECOND = 1_000_000 * MICROSECOND


def reference(source: Source, team_id: int, start: datetime, end: datetime) -> list[Row]:
    """The latest state of every distinct_id that the interval touched, itself or through its person."""
    persons = table(source, "person", "id, version, properties, created_at, is_deleted, _timestamp", team_id)
    mappings = table(source, "person_distinct_id2", "distinct_id, version, person_id, is_deleted, _timestamp", team_id)
    latest_person = latest(persons, "id")
    changed_ids = touched(mappings, "distinct_id", start, end)
    changed_persons = touched(persons, "id", start, end)
    rows = []
    for distinct_id, mapped in latest(mappings, "distinct_id").items():
        owner = latest_person.get(mapped["person_id"])
        if owner and (distinct_id in changed_ids or mapped["person_id"] in changed_persons):
            row = (
                team_id,
                distinct_id,
                str(mapped["person_id"]),
                owner["properties"] or None,
                mapped["version"],
                owner["version"],
                owner["created_at"],
                bool(owner["is_deleted"] or mapped["is_deleted"]),
            )
            rows.append(comparable(row, COLUMNS))
    return rows


def table(source: Source, name: str, columns: str, team_id: int) -> list[dict[str, Any]]:
    rows = source.rows(f"SELECT team_id, {columns} FROM {name}")
    return [dict(zip(columns.split(", "), row[1:], strict=True)) for row in rows if row[0] == team_id]


def latest(rows: Iterable[dict[str, Any]], key: str) -> dict[Any, dict[str, Any]]:
    return {row[key]: row for row in sorted(rows, key=lambda row: int(row["version"]))}


def touched(rows: Iterable[dict[str, Any]], key: str, start: datetime, end: datetime) -> set[Any]:
    return {row[key] for row in rows if start <= (instant(row["_timestamp"]) or start) < end}


def test_the_whole_sample_lands_row_by_row_and_column_by_column(
    sample: Source, sample_end: datetime, target: Target
) -> None:
    start = sample_end - SAMPLE_HOURS * HOUR
    export = export_of("persons", target, sample_end)
    clickhouse, postgres = sample.resource(), target.resource()
    assert materialise(export, clickhouse, postgres, partition_key(empty_hour(sample_end))).counts == (0, 0, 0)
    assert created_columns(target, "persons") == DEFAULT
    target.execute(ADD_OPTIONAL)
    run = materialise(export, clickhouse, postgres, partition_key(start), partition_key(sample_end - HOUR))
    assert run.error is None

    expected = reference(sample, TEAM, start, sample_end)
    assert len(expected) > 150
    assert differences(landed_rows(target, "persons", COLUMNS), expected) == {}
    assert {row[-1] for row in expected} == {True, False}


def test_each_hour_of_the_sample_alone_has_the_rows_that_it_touched(
    sample: Source, sample_end: datetime, target: Target
) -> None:
    for back in (1, 12):
        name, start = f"persons_{back}", sample_end - back * HOUR
        export = export_of("persons", target, sample_end, name=name)
        assert materialise(export, sample.resource(), target.resource(), partition_key(start)).error is None
        columns = {column: kind for column, kind in COLUMNS.items() if column not in OPTIONAL}
        expected = [row[:-1] for row in reference(sample, TEAM, start, start + HOUR)]
        assert differences(landed_rows(target, "persons", columns), expected) == {}
        target.execute("DROP TABLE persons")


def states(target: Target) -> dict[str, tuple[Any, ...]]:
    """Of each distinct_id: person, properties, mapping's version, person's version."""
    rows = target.rows(
        "SELECT distinct_id, person_id, properties, person_distinct_id_version, person_version FROM persons"
    )
    return {row[0]: (uuid.UUID(row[1]), json.loads(row[2]) if row[2] else None, *row[3:]) for row in rows}


ADA, BOB, EVE = (uuid.UUID(int=number) for number in (1, 2, 3))


def test_only_what_the_interval_touched_is_exported(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    before, end = hour - HOUR, hour + HOUR
    ids = {name: uuid.uuid4() for name in ("start", "last", "early", "late", "mapping", "person", "many")}
    source.insert(
        "person",
        person(hour, ids["start"], 0),
        person(end - SECOND, ids["last"], 0),
        person(hour - SECOND, ids["early"], 0),
        person(end, ids["late"], 0),
        person(before, ids["mapping"], 0),
        person(hour, ids["person"], 0),
        person(before, ids["many"], 0),
        person(hour, ids["many"], 1),
        person(hour, uuid.uuid4(), 0),
        person(hour, uuid.uuid4(), 0, team_id=TEAM + 1),
        person(before, ids["early"], 7, team_id=TEAM + 1),
    )
    source.insert(
        "person_distinct_id2",
        *(mapping(before, name, ids[name]) for name in ("start", "last", "early", "late", "person")),
        *(mapping(before, name, ids["many"]) for name in ("many 1", "many 2", "many 3")),
        mapping(hour, "mapping", ids["mapping"]),
        mapping(hour, "without a profile", uuid.uuid4()),
        mapping(hour, "early", ids["early"], 5, team_id=TEAM + 1),
    )
    assert run(export_of("persons", target, hour), partition_key(hour)).error is None
    assert set(states(target)) == {"start", "last", "person", "mapping", "many 1", "many 2", "many 3"}


def test_a_mapping_to_another_person_wins_though_that_person_has_a_lower_version(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    source.insert("person", person(hour, ADA, 9), person(hour - HOUR, BOB, 2))
    source.insert("person_distinct_id2", mapping(hour, "a", ADA, 0))
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("person_distinct_id2", mapping(hour + HOUR, "a", BOB, 1))
    assert run(export, partition_key(hour + HOUR)).counts == (0, 1, 0)
    assert states(target) == {"a": (BOB, {"version": 2}, 1, 2)}

    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    # The person that the distinct_id left behind is none of its business any more.
    source.insert("person", person(hour + 2 * HOUR, ADA, 10))
    assert run(export, partition_key(hour + 2 * HOUR)).counts == (0, 0, 0)
    assert states(target) == {"a": (BOB, {"version": 2}, 1, 2)}


def test_a_version_that_postgres_is_ahead_of_never_wins(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    source.insert("person", *(person(hour, who, 5) for who in (ADA, BOB, EVE)))
    source.insert(
        "person_distinct_id2", *(mapping(hour, name, who, 5) for name, who in (("a", ADA), ("b", BOB), ("e", EVE)))
    )
    run(export, partition_key(hour))
    target.execute(
        "UPDATE persons SET person_distinct_id_version = 6, person_version = 0, properties = '{}' WHERE distinct_id = 'a'",
        "UPDATE persons SET person_distinct_id_version = 4, person_version = 9, properties = '{}' WHERE distinct_id = 'b'",
        "UPDATE persons SET person_distinct_id_version = NULL, properties = '{}' WHERE distinct_id = 'e'",
    )
    assert run(export, partition_key(hour)).counts == (0, 2, 1)
    assert states(target) == {
        "a": (ADA, {}, 6, 0),
        "b": (BOB, {"version": 5}, 5, 5),
        "e": (EVE, {"version": 5}, 5, 5),
    }


def test_a_higher_version_with_an_older_time_is_the_latest_and_does_not_vanish(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES person")
    source.execute("SYSTEM STOP MERGES person_distinct_id2")
    long_ago = hour - 1_000 * HOUR
    source.insert("person", person(hour, ADA, 3))
    source.insert("person", person(long_ago, ADA, 4, created_at=hour + 7_000 * MICROSECOND))
    source.insert("person", person(long_ago, BOB, 0))
    source.insert("person_distinct_id2", mapping(long_ago, "a", ADA), mapping(hour, "b", ADA, 1))
    source.insert("person_distinct_id2", mapping(long_ago, "b", BOB, 2))
    assert run(export_of("persons", target, hour), partition_key(hour)).counts == (2, 0, 0)
    assert states(target) == {"a": (ADA, {"version": 4}, 0, 4), "b": (BOB, {"version": 0}, 2, 0)}
    assert target.rows("SELECT created_at FROM persons WHERE distinct_id = 'a'") == [(hour + 7_000 * MICROSECOND,)]


def test_a_deleted_person_or_mapping_blanks_what_postgres_holds(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    run(export, partition_key(hour - HOUR))
    target.execute(ADD_OPTIONAL)
    source.insert("person", *(person(hour, who, 1) for who in (ADA, BOB, EVE)))
    source.insert(
        "person_distinct_id2", *(mapping(hour, name, who) for name, who in (("a", ADA), ("b", BOB), ("e", EVE)))
    )
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    assert target.rows("SELECT DISTINCT is_deleted FROM persons") == [(False,)]

    after = hour + HOUR
    source.insert("person", person(after, ADA, 101, properties="{}", is_deleted=1))
    source.insert("person", person(after, EVE, 101, properties="", is_deleted=1))
    source.insert("person_distinct_id2", mapping(after, "b", BOB, 100, is_deleted=1))
    assert run(export, partition_key(after)).counts == (0, 3, 0)
    assert states(target) == {
        "a": (ADA, {}, 0, 101),
        "b": (BOB, {"version": 1}, 100, 1),
        "e": (EVE, None, 0, 101),
    }
    assert target.rows("SELECT DISTINCT is_deleted FROM persons") == [(True,)]

    source.insert("person_distinct_id2", mapping(after + HOUR, "b", BOB, 101))
    assert run(export, partition_key(after + HOUR)).counts == (0, 1, 0)
    assert target.rows("SELECT is_deleted FROM persons WHERE distinct_id = 'b'") == [(False,)]


def test_one_distinct_id_in_two_teams_is_two_people(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("person", person(hour, ADA, 1), person(hour, BOB, 2, team_id=2), person(hour, ADA, 8, team_id=2))
    source.insert("person_distinct_id2", mapping(hour, "a", ADA), mapping(hour, "a", BOB, 3, team_id=2))
    assert run(export_of("persons", target, hour), partition_key(hour)).counts == (1, 0, 0)
    other = export_of("persons", target, hour, name="team_two", table="persons", team_id=2)
    assert run(other, partition_key(hour)).counts == (1, 0, 0)
    columns = {name: DEFAULT[name] for name in ("team_id", "distinct_id", "person_id", "person_version")}
    expected = [(1, "a", str(ADA), 1), (2, "a", str(BOB), 2)]
    assert differences(landed_rows(target, "persons", columns), expected) == {}
