"""Columns that an export leaves out, renames or adds."""

import json
from datetime import date, datetime
from typing import Any

import dagster as dg
import pytest

from pg_exports_tests.conftest import RunExport, Source, Target, materialise, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, insert_sessions, new_session, session
from pg_exports_tests.yaml_exports import Load, refusal, said, yaml

PLAN = {"expression": "JSONExtractString(properties, 'plan')", "type": "TEXT"}


def columns(target: Target, table: str = "events") -> list[str]:
    """The table's columns, in its order."""
    return [
        name
        for (name,) in target.rows(
            f"SELECT attname::text FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 ORDER BY attnum"
        )
    ]


def test_a_table_is_made_without_the_columns_that_are_left_out_and_with_those_that_are_renamed_or_added(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, properties='{"plan": "pro", "$ip": "1.2.3.4"}', distinct_id="a"))
    changes: dict[str, Any] = {
        **dict.fromkeys(("elements", "set", "set_once", "site_url"), False),
        "ip": "address",
        "timestamp": "happened at",
        "person_id": True,
        "plan": PLAN,
    }
    done = run(export_of("events", target, hour, columns=changes), partition_key(hour))
    assert done.error is None
    assert columns(target) == [
        *("uuid", "event", "properties", "distinct_id", "team_id", "address", "happened at", "person_id", "plan")
    ]
    assert target.rows('SELECT address, "happened at", plan FROM events') == [("1.2.3.4", hour, "pro")]
    assert done.checks["table_columns"].passed
    assert done.metadata[partition_key(hour)]["first_timestamp"] == hour.timestamp()


def test_what_is_left_out_is_not_read_from_clickhouse(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour, columns={"elements": False, "plan": PLAN})
    run(export, partition_key(hour))
    [read] = source.columns_read("events")
    assert "elements_chain" not in read


@pytest.mark.parametrize(
    ("expression", "postgres_type", "expected"),
    [
        ("JSONExtractString(properties, 'plan')", "TEXT", "pro"),
        ("JSONExtractString(properties, 'plan')", "VARCHAR(3)", "pro"),
        ("JSONExtractInt(properties, 'n')", "INTEGER", 7),
        ("JSONExtractInt(properties, 'n')", "bigint", 7),
        ("JSONExtractFloat(properties, 'x')", "DOUBLE PRECISION", 1.5),
        ("JSONExtractBool(properties, 'yes')", "BOOLEAN", True),
        ("JSONExtractRaw(properties, 'list')", "JSONB", ["a", "b"]),
        ("JSONExtract(e.properties, 'list', 'Array(String)')", "TEXT[]", ["a", "b"]),
        ("toStartOfDay(timestamp)", "TIMESTAMPTZ", None),
        ("toDate('2026-02-28')", "DATE", date(2026, 2, 28)),
        ("toDate32('1925-01-01')", "DATE", date(1925, 1, 1)),
        ("nullIf('', '')", "DATE", None),
        ("upper(event) -- a comment", "TEXT", "$PAGEVIEW"),
        ("JSONExtractString(person_properties, 'name')", "TEXT", "Zoë"),
        ("e._offset", "BIGINT", 42),
        ("NULL", "TEXT", None),
    ],
)
def test_an_added_column_has_the_value_of_its_expression(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    expression: str,
    postgres_type: str,
    expected: object,
) -> None:
    properties = {"plan": "pro", "n": 7, "x": 1.5, "yes": True, "list": ["a", "b"]}
    who = json.dumps({"name": "Zoë"})
    source.insert("events", event(hour, properties=json.dumps(properties), person_properties=who, _offset=42))
    added = {"added": {"expression": expression, "type": postgres_type}}
    done = run(export_of("events", target, hour, columns=added), partition_key(hour))
    assert done.error is None
    [(value,)] = target.rows("SELECT added FROM events")
    value = json.loads(value) if postgres_type == "JSONB" else value
    assert value == (hour.replace(hour=0) if "StartOfDay" in expression else expected)


def test_a_renamed_key_is_still_what_rows_are_merged_and_recognised_by(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    first = new_session(hour)
    insert_sessions(source, session(first, hour))
    merged = export_of("sessions", target, hour, columns={"session_id": "id", "end_timestamp": "ended"})
    assert run(merged, partition_key(hour)).counts == (1, 0, 0)
    insert_sessions(source, session(first, hour + HOUR, ended=hour + HOUR))
    assert run(merged, partition_key(hour + HOUR)).counts == (0, 1, 0)
    assert target.rows("SELECT id, ended FROM sessions") == [(str(first), hour + HOUR)]

    source.insert("events", event(hour), event(hour))
    appended = export_of("events", target, hour, columns={"uuid": "id", "event": "name"})
    assert run(appended, partition_key(hour)).counts == (2, 0, 0)
    target.execute("DELETE FROM pg_exports_keys")
    assert run(appended, partition_key(hour)).counts == (0, 0, 2)
    replay = {"ops": {"events": {"config": {"replay": True}}}}
    assert run(appended, partition_key(hour), run_config=replay).counts == (0, 0, 2)


def test_a_rejected_row_is_kept_under_the_renamed_columns(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event="x" * 201, distinct_id=b"\xff"))
    done = run(export_of("events", target, hour, columns={"event": "name"}), partition_key(hour))
    assert done.error is None
    [(column, key, row)] = target.rows("SELECT column_name, key::text, row_as_it_was FROM pg_exports_rejected")
    assert column == "name"
    assert json.loads(key)["name"] == json.loads(row)["name"] == "x" * 201
    assert json.loads(row)["distinct_id"] == "\udcff"


def test_a_column_that_is_added_to_an_existing_table_by_hand_is_filled_from_then_on(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR), event(hour, properties='{"plan": "pro"}'))
    run(export_of("events", target, hour), partition_key(hour - HOUR))
    with_plan = export_of("events", target, hour, columns={"plan": PLAN})
    evaluation = run(with_plan, partition_key(hour - HOUR)).checks["table_columns"]
    statement = f'ALTER TABLE "{target.schema}"."events" ADD COLUMN "plan" TEXT;'
    assert not evaluation.passed
    assert evaluation.metadata["lacking"].value == {"plan": statement}
    target.execute(statement)
    assert run(with_plan, partition_key(hour)).checks["table_columns"].passed
    assert target.rows("SELECT plan FROM events ORDER BY timestamp") == [(None,), ("pro",)]


def test_downstream_reads_the_interval_by_a_renamed_time_of_insertion(
    source: Source, target: Target, hour: datetime
) -> None:
    read: list[int] = []

    @dg.asset(
        ins={"events": dg.AssetIn(input_manager_key="postgres_io_manager")},
        partitions_def=dg.HourlyPartitionsDefinition(hour.replace(tzinfo=None)),
    )
    def downstream(events: Any) -> None:
        read.append(events.height)

    source.insert("events", event(hour), event(hour + HOUR))
    export = export_of("events", target, hour, start=hour, columns={"inserted_at": "received"})
    for each in (hour, hour + HOUR):
        done = materialise(export, source.resource(), target.resource(), partition_key(each), downstream=[downstream])
        assert done.error is None
    assert read == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nothing": False}, "nothing"),
        ({"uuid": False}, "uuid"),
        ({"team_id": "project"}, "team_id"),
        ({"event": "uuid"}, "uuid"),
        ({"event": PLAN}, "event"),
        ({"plan": {"expression": "1", "type": "MONEY"}}, "MONEY"),
        ({"plan": {"expression": "event"}}, "plan: `type`: Field required"),
        ({"plan": {"expression": "", "type": "TEXT"}}, "expression"),
        ({"p" * 64: PLAN}, "63"),
        ({"plan": 5}, "plan"),
        (["plan"], "`columns`"),
    ],
)
def test_a_wrong_change_is_one_error_that_names_the_column(load: Load, changes: object, message: str) -> None:
    text = said(refusal(load, yaml(columns=changes)))
    assert text.startswith("Export events: `columns`: ")
    assert message in text


def test_an_expression_that_clickhouse_refuses_is_an_error_with_its_words(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    columns = {"plan": {"expression": "no_such_function(properties)", "type": "TEXT"}}
    error = run(export_of("events", target, hour, columns=columns), partition_key(hour)).error
    assert error is not None
    assert "no_such_function" in error
