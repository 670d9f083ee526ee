"""When the entry of a rejected row counts as resolved: once that row has been read again, and has landed."""

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, mapping, person

TOO_LONG = "x" * 201
ROOM = "ALTER TABLE events ALTER COLUMN event TYPE text"


def unresolved(target: Target, column: str = "event") -> list[str]:
    """What the rows' keys have in a column, of entries that are unresolved."""
    rows = target.rows(f"SELECT key->>'{column}' FROM pg_exports_rejected WHERE resolved_at IS NULL ORDER BY 1")
    return [value for (value,) in rows]


def test_another_teams_run_leaves_a_teams_rejected_rows_unresolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event=TOO_LONG), event(hour, team_id=2))
    run(export_of("events", target, hour), partition_key(hour))
    assert run(export_of("events", target, hour, team_id=2), partition_key(hour)).counts == (1, 0, 0)
    assert unresolved(target) == [TOO_LONG]


@pytest.mark.parametrize(
    "narrower",
    [
        {"include_events": ["$pageview"]},
        {"exclude_events": [TOO_LONG]},
        {"filters": [{"key": "plan", "operator": "is_set"}]},
    ],
    ids=["include", "exclude", "filter"],
)
def test_a_narrower_selection_resolves_nothing_that_it_leaves_out(
    narrower: Mapping[str, Any], source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, properties='{"plan": 1}'), event(hour, event=TOO_LONG))
    run(export_of("events", target, hour), partition_key(hour))
    target.execute(ROOM)
    run(export_of("events", target, hour, **narrower), partition_key(hour))
    assert unresolved(target) == [TOO_LONG]
    run(export_of("events", target, hour), partition_key(hour))
    assert unresolved(target) == []


def test_of_two_rejected_rows_only_the_one_that_landed_is_resolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    source.insert("events", event(hour), event(hour, event=TOO_LONG), event(hour, event="nan", properties='{"a": NaN}'))
    run(export, partition_key(hour))
    target.execute(ROOM)
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    assert unresolved(target) == ["nan"]


@pytest.mark.parametrize("model", ["events", "persons"])
def test_after_a_rename_of_its_export_a_row_that_lands_is_resolved(
    source: Source, target: Target, run: RunExport, hour: datetime, model: str
) -> None:
    source.insert("events", event(hour), *(event(hour, event=TOO_LONG, distinct_id=name) for name in "ab"))
    source.insert("person", person(hour, uuid.UUID(int=1), 2**31), person(hour, uuid.UUID(int=2), 1))
    mappings = [mapping(hour, name, uuid.UUID(int=number)) for name, number in (("a", 1), ("b", 1), ("c", 2))]
    source.insert("person_distinct_id2", *mappings)
    run(export_of(model, target, hour), partition_key(hour))
    assert unresolved(target, "distinct_id") == ["a", "b"]
    target.execute(ROOM if model == "events" else "ALTER TABLE persons ALTER COLUMN person_version TYPE bigint")
    source.execute("DELETE FROM events WHERE distinct_id = 'b'")
    source.execute("DELETE FROM person_distinct_id2 WHERE distinct_id = 'b'")
    renamed = export_of(model, target, hour, name="renamed", table=model)
    assert run(renamed, partition_key(hour)).counts[0] == 1
    assert unresolved(target, "distinct_id") == ["b"]


def test_another_teams_run_by_another_name_resolves_no_row_with_the_same_key(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute(
        "CREATE TABLE visits (team Int64, id Int64, page String, at DateTime) ENGINE = MergeTree ORDER BY at"
    )
    model: Any = {
        "name": "visits",
        "query": "SELECT id, page FROM visits"
        " WHERE team = {team_id} AND at >= {interval_start} AND at < {interval_end}",
        "columns": {"id": "BIGINT", "page": "VARCHAR(3)"},
        "key": ["id"],
    }
    source.insert(
        "visits", {"team": 1, "id": 1, "page": "long", "at": hour}, {"team": 2, "id": 1, "page": "/", "at": hour}
    )
    export, other = (
        export_of(model, target, hour, name=f"team_{team}", table="visits", team_id=team) for team in (1, 2)
    )
    run(export, partition_key(hour))
    assert run(other, partition_key(hour)).counts == (1, 0, 0)
    assert unresolved(target, "id") == ["1"]


def test_a_row_that_was_erased_at_the_source_stays_unresolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    source.insert("events", event(hour), event(hour, event=TOO_LONG))
    run(export, partition_key(hour))
    source.execute("DELETE FROM events WHERE length(event) > 200")
    target.execute(ROOM)
    run(export, partition_key(hour))
    run(export, partition_key(hour))
    assert unresolved(target) == [TOO_LONG]


def test_a_row_that_changed_and_is_still_bad_resolves_no_entry_of_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    bad = event(hour, properties='{"a": NaN}')
    source.insert("events", bad)
    run(export, partition_key(hour))
    source.execute("TRUNCATE TABLE events")
    source.insert("events", bad | {"properties": '{"a": Infinity}'})
    run(export, partition_key(hour))
    assert len(unresolved(target)) == 2
    source.execute("TRUNCATE TABLE events")
    source.insert("events", bad | {"properties": '{"a": 1}'})
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert unresolved(target) == []


def test_a_row_that_a_trigger_drops_is_not_resolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    source.insert("events", event(hour), event(hour, event=TOO_LONG))
    run(export, partition_key(hour))
    target.execute(
        ROOM,
        "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER dropping BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION drop_it()",
    )
    run(export, partition_key(hour))
    assert unresolved(target) == [TOO_LONG]
    target.execute("DROP TRIGGER dropping ON events")
    run(export, partition_key(hour))
    assert unresolved(target) == []


def test_in_a_range_each_interval_resolves_its_own_entries(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    for n in range(3):
        source.insert("person", person(hour + n * HOUR, uuid.UUID(int=n + 1), 2**31))
        source.insert("person_distinct_id2", mapping(hour + n * HOUR, f"d{n}", uuid.UUID(int=n + 1)))
    first, last = partition_key(hour - HOUR), partition_key(hour + 2 * HOUR)
    run(export, first, last)
    assert unresolved(target, "distinct_id") == ["d0", "d1", "d2"]
    target.execute("ALTER TABLE persons ALTER COLUMN person_version TYPE bigint")
    source.execute("DELETE FROM person_distinct_id2 WHERE distinct_id = 'd1'")
    assert run(export, first, last).counts == (2, 0, 0)
    assert unresolved(target, "distinct_id") == ["d1"]


def test_a_merged_row_that_is_there_in_a_newer_state_is_resolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    source.insert("person", person(hour, uuid.UUID(int=1), 2**31))
    source.insert("person_distinct_id2", mapping(hour, "d", uuid.UUID(int=1)))
    run(export, partition_key(hour))
    target.execute("ALTER TABLE persons ALTER COLUMN person_version TYPE bigint")
    other = export_of("persons", target, hour, name="other", table="persons", interval="every 15 minutes")
    assert run(other, partition_key(hour)).counts[0] == 1
    assert unresolved(target, "distinct_id") == ["d"]
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert unresolved(target, "distinct_id") == []


def test_over_several_streams_each_part_resolves_the_entries_of_its_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour, streams=2)
    source.insert("events", *(event(hour, event=f"{n}" + TOO_LONG) for n in range(40)), event(hour, team_id=2))
    run(export, partition_key(hour))
    assert len(unresolved(target)) == 40
    run(export_of("events", target, hour, streams=2, team_id=2), partition_key(hour))
    assert len(unresolved(target)) == 40
    source.execute("DELETE FROM events WHERE startsWith(event, '7x')")
    target.execute(ROOM)
    assert run(export, partition_key(hour)).counts == (39, 0, 0)
    assert unresolved(target) == [f"7{TOO_LONG}"]


MEASURES: dict[str, Any] = {
    "name": "measures",
    "query": "SELECT value, name, at FROM measures WHERE at >= {interval_start} AND at < {interval_end}",
    "columns": {"value": "DOUBLE PRECISION", "name": "VARCHAR(3)", "at": "TIMESTAMPTZ"},
    "key": ["value", "at"],
}


@pytest.mark.parametrize("version", [[], ["at"]], ids=["appended", "merged"])
def test_rows_with_a_key_that_is_no_number_are_set_aside_and_resolved(
    version: list[str], source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("CREATE TABLE measures (value Float64, name String, at DateTime) ENGINE = MergeTree ORDER BY at")
    values = [float("nan"), float("inf"), float("-inf"), 1.5]
    source.insert("measures", *({"value": value, "name": "long", "at": hour} for value in values))
    model = MEASURES | ({"key": ["value"], "version": version} if version else {})
    export = export_of(model, target, hour, team_id=None)  # type: ignore[arg-type]
    done = run(export, partition_key(hour))
    assert done.error is None
    assert unresolved(target, "value") == ["-Infinity", "1.5", "Infinity", "NaN"]
    kept = target.rows("SELECT row_as_it_was::json->>'value' FROM pg_exports_rejected ORDER BY 1")
    assert [value for (value,) in kept] == ["-Infinity", "1.5", "Infinity", "NaN"]
    target.execute("ALTER TABLE measures ALTER COLUMN name TYPE text")
    assert run(export, partition_key(hour)).counts == (4, 0, 0)
    assert unresolved(target, "value") == []
