"""Property filters of an export, from YAML to the rows that land."""

import json
import uuid
from datetime import datetime
from typing import Any

import pytest

from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import event, export_of, mapping, person
from pg_exports_tests.test_late_rows import asked
from pg_exports_tests.yaml_exports import Load, refusal, said, yaml

PAID = {"key": "plan", "operator": "exact", "value": ["pro", "team"], "type": "event"}


def landed(target: Target, table: str = "events") -> set[str]:
    """The distinct_ids of the rows in a table."""
    return {distinct_id for (distinct_id,) in target.rows(f"SELECT distinct_id FROM {table}")}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"operator": "exact", "value": "Pro"}, {"text"}),
        ({"operator": "exact", "value": ["Pro", 7]}, {"text", "number"}),
        ({"operator": "exact", "value": True}, {"boolean"}),
        ({"operator": "is_not", "value": "Pro"}, {"number", "boolean", "null", "absent"}),
        ({"operator": "icontains", "value": "pR"}, {"text"}),
        ({"operator": "not_icontains", "value": "pR"}, {"number", "boolean", "null", "absent"}),
        ({"operator": "regex", "value": "^[A-Z]r"}, {"text"}),
        ({"operator": "not_regex", "value": "^[A-Z]r"}, {"number", "boolean", "null", "absent"}),
        ({"operator": "gt", "value": 6.5}, {"number"}),
        ({"operator": "gt", "value": 7}, set()),
        ({"operator": "gte", "value": 7}, {"number"}),
        ({"operator": "lt", "value": "7.5"}, {"number"}),
        ({"operator": "lte", "value": 7}, {"number"}),
        ({"operator": "is_set"}, {"text", "number", "boolean"}),
        ({"operator": "is_not_set"}, {"null", "absent"}),
    ],
    ids=lambda value: f"{value['operator']} {value.get('value')}" if isinstance(value, dict) else "",
)
def test_the_events_land_whose_property_passes_the_filter(
    source: Source, target: Target, run: RunExport, hour: datetime, condition: dict[str, Any], expected: set[str]
) -> None:
    values: dict[str, object] = {"text": "Pro", "number": 7, "boolean": True, "null": None}
    source.insert(
        "events",
        event(hour, distinct_id="absent"),
        *(event(hour, distinct_id=name, properties=json.dumps({"plan": value})) for name, value in values.items()),
    )
    export = export_of("events", target, hour, filters=[{"key": "plan", "type": "event", **condition}])
    done = run(export, partition_key(hour))
    assert done.error is None
    assert landed(target) == expected
    assert done.metadata[partition_key(hour)]["rows_at_source"] == len(expected)


def test_all_filters_must_hold_on_the_event_and_on_the_person(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    for plan, country in (("pro", "NL"), ("pro", "DE"), ("free", "NL")):
        row = event(hour, distinct_id=f"{plan} {country}", properties=json.dumps({"plan": plan}))
        source.insert("events", row | {"person_properties": json.dumps({"country": country})})
    dutch = {"key": "country", "operator": "exact", "value": "NL", "type": "person"}
    assert run(export_of("events", target, hour, filters=[PAID, dutch]), partition_key(hour)).error is None
    assert landed(target) == {"pro NL"}


def test_what_no_filter_lets_through_is_no_late_event_and_what_it_does_is_one(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour, filters=[PAID])
    source.insert("events", event(hour, properties='{"plan": "pro"}'), event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", event(hour, properties='{"plan": "free"}'))
    assert asked(export, source, target) == []
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    source.insert("events", event(hour, properties='{"plan": "team"}'))
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour)).counts == (1, 0, 1)


def test_a_wider_filter_brings_the_rows_that_the_narrower_one_left_out_and_no_other(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, properties=json.dumps({"plan": plan})) for plan in ("pro", "free", "team")))
    assert run(export_of("events", target, hour, filters=[PAID]), partition_key(hour)).counts == (2, 0, 0)
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (1, 0, 2)
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(3, 3)]


def test_persons_are_filtered_by_their_latest_properties(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    for name, properties in (("a", {"plan": "pro"}), ("b", {"plan": "free"}), ("c", {})):
        who = uuid.uuid4()
        source.insert("person", person(hour, who, 1, properties='{"plan": "pro"}'))
        source.insert("person", person(hour, who, 2, properties=json.dumps(properties)))
        source.insert("person_distinct_id2", mapping(hour, name, who))
    export = export_of("persons", target, hour, filters=[{"key": "plan", "value": "pro"}])
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert landed(target, "persons") == {"a"}


def test_quotes_and_braces_in_a_filter_are_data(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    key, value = 'it\'s "{x:String}" \\', "a' OR 1=1 -- {y:String}\n%_"
    source.insert("events", event(hour, distinct_id="hit", properties=json.dumps({key: value})), event(hour))
    done = run(export_of("events", target, hour, filters=[{"key": key, "value": value}]), partition_key(hour))
    assert done.error is None
    assert landed(target) == {"hit"}


def test_a_pattern_that_is_none_is_an_error_that_names_the_setting(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, properties='{"a": "b"}'))
    export = export_of("events", target, hour, filters=[{"key": "a", "operator": "regex", "value": "("}])
    error = run(export, partition_key(hour)).error
    assert error is not None
    assert "`filters`" in error


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([{"operator": "exact", "value": 1}], "number 1: `key`: Field required"),
        ([PAID, {"key": "a", "operator": "like", "value": 1}], "number 2: `operator`: Input should be"),
        ([{"key": "a"}], "`value` is missing"),
        ([{"key": "a", "operator": "is_set", "value": 1}], "has no `value`"),
        ([{"key": "a", "operator": "gt", "value": "much"}], "needs one number"),
        ([{"key": "a", "value": 1, "type": "group"}], "number 1: `type`: Input should be 'event' or 'person'"),
        ([{"key": "a", "vlaue": 1}], "`vlaue`: there is no such attribute"),
        ({"key": "a", "value": 1}, "`filters`"),
    ],
)
def test_a_wrong_filter_is_one_error_that_says_which(load: Load, wrong: object, message: str) -> None:
    text = said(refusal(load, yaml(filters=wrong)))
    assert text.startswith("Export events: `filters`: ")
    assert message in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "sessions", "filters": [PAID]}, "`filters`: sessions have no properties to filter by"),
        ({"model": "persons", "filters": [PAID]}, "`filters`: persons have no properties of `type: event`"),
    ],
)
def test_a_filter_that_the_model_cannot_have_is_an_error(load: Load, changes: dict[str, Any], message: str) -> None:
    assert message in said(refusal(load, yaml(**changes)))
