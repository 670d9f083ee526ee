"""What each materialisation shows: counts, sizes and times as plain numbers, the interval, the table, and the queries."""

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from pg_exports import PostgresExport
from pg_exports.errors import PassingError
from pg_exports.partitions import IntervalLength
from pg_exports.postgres import progress
from pg_exports.postgres.progress import Progress
from pg_exports.schedule import freshness
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import ROWS, fill, fill_persons
from pg_exports_tests.source_rows import HOUR, event, export_of

NUMBERS = {
    "rows_at_source": int,
    "rows_inserted": int,
    "rows_updated": int,
    "rows_unchanged": int,
    "rows_repaired": int,
    "rows_rejected": int,
    "bytes": int,
    "seconds": float,
    "seconds_source": float,
    "seconds_transform": float,
    "seconds_copy": float,
    "rows_per_second": float,
    "lag_seconds": float,
    "dagster/partition_row_count": int,
}
"""What Dagster draws over time."""


def only(run: Run) -> dict[str, Any]:
    """The metadata of a run's one partition."""
    assert run.error is None
    [metadata] = run.metadata.values()
    return metadata


def test_what_is_counted_or_measured_is_a_plain_number(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour) for _ in range(3)))
    metadata = only(run(export_of("events", target, hour), partition_key(hour)))
    assert {name: type(metadata[name]) for name in NUMBERS} == NUMBERS
    assert metadata["rows_at_source"] == metadata["rows_inserted"] == metadata["dagster/partition_row_count"] == 3
    assert 0 < metadata["seconds_copy"] < metadata["seconds"]
    assert 0 < metadata["seconds_source"] < metadata["seconds"]
    assert metadata["rows_per_second"] == pytest.approx(3 / metadata["seconds"], rel=0.05)


def test_the_lag_is_from_the_intervals_end_to_its_commit(target: Target, run: RunExport, hour: datetime) -> None:
    metadata = only(run(export_of("events", target, hour), partition_key(hour)))
    [(committed_at,)] = target.rows("SELECT committed_at FROM pg_exports_ledger")
    lag = (committed_at - (hour + HOUR)).total_seconds()
    assert metadata["lag_seconds"] == pytest.approx(lag, abs=2)
    assert datetime.fromtimestamp(metadata["interval_end"], UTC) == hour + HOUR


def test_the_first_and_the_last_time_are_those_of_the_rows_and_not_of_their_insertion(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    first, last = hour - timedelta(days=30), hour + timedelta(minutes=5)
    source.insert("events", event(hour, timestamp=last), event(hour, timestamp=first), event(hour))
    metadata = only(run(export_of("events", target, hour), partition_key(hour)))
    assert datetime.fromtimestamp(metadata["first_timestamp"], UTC) == first
    assert datetime.fromtimestamp(metadata["last_timestamp"], UTC) == last
    empty = only(run(export_of("events", target, hour), partition_key(hour - HOUR)))
    assert not {"first_timestamp", "last_timestamp"} & set(empty)


def test_a_merge_has_its_seconds_too(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    fill_persons(source, hour)
    metadata = only(run(export_of("persons", target, hour), partition_key(hour)))
    assert metadata["seconds_merge"] > 0.02
    assert metadata["seconds_merge"] + metadata["seconds_copy"] < metadata["seconds"]


def test_the_queries_ids_are_those_that_clickhouse_is_told(
    source: Source, target: Target, run: RunExport, hour: datetime, caplog: pytest.LogCaptureFixture
) -> None:
    source.insert("events", event(hour), event(hour - HOUR))
    export = export_of("events", target, hour)
    run(export, partition_key(hour - HOUR))
    with caplog.at_level("DEBUG", "urllib3.connectionpool"):
        done = run(export, partition_key(hour - HOUR), partition_key(hour))
    assert done.error is None
    for metadata in done.metadata.values():
        # The sandbox's engine takes no query ids, and its query log has others; the server is told them all the same.
        [query_id] = metadata["query_ids"].split(", ")
        [request] = [message for message in caplog.messages if query_id in message]
        assert f"query_id={query_id}" in request
    first, second = (metadata["query_ids"] for metadata in done.metadata.values())
    assert first != second


def test_the_table_and_its_columns_are_those_that_are_there_and_each_tells_where_it_comes_from(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute("CREATE TABLE events (uuid text NOT NULL, event varchar(500), set jsonb, extra int)")
    target.execute(f'ALTER TABLE events OWNER TO "{target.resource().user}"')
    metadata = only(run(export_of("events", target, hour), partition_key(hour)))
    assert metadata["dagster/table_name"] == f"{target.schema}.events"
    columns = {column.name: column for column in metadata["dagster/column_schema"].columns}
    assert {name: column.type for name, column in columns.items()} == {
        "uuid": "text",
        "event": "character varying(500)",
        "set": "jsonb",
    }
    assert [name for name, column in columns.items() if not column.constraints.nullable] == ["uuid"]
    lineage = metadata["dagster/column_lineage"].deps_by_column
    assert {
        name: [(dep.asset_key.to_user_string(), dep.column_name) for dep in deps] for name, deps in lineage.items()
    } == {
        "uuid": [("clickhouse/events", "uuid")],
        "event": [("clickhouse/events", "event")],
        "set": [("clickhouse/events", "properties")],
    }


@pytest.mark.parametrize(
    ("model", "tables"),
    [
        ("events", {"events"}),
        ("persons", {"person", "person_distinct_id2"}),
        ("sessions", {"raw_sessions"}),
    ],
)
def test_the_source_tables_stand_before_an_export_in_the_graph(
    target: Target, hour: datetime, model: str, tables: set[str]
) -> None:
    [asset] = export_of(model, target, hour).build_defs(None).assets or []
    assert isinstance(asset, dg.AssetsDefinition)
    assert {dep.asset_key.path[-1] for dep in asset.get_asset_spec().deps} == tables
    lineage = asset.get_asset_spec().metadata["dagster/column_lineage"].deps_by_column
    assert {dep.asset_key.path[-1] for deps in lineage.values() for dep in deps} == tables
    # Columns that are always NULL come from nowhere.
    created = {column.name for column in asset.get_asset_spec().metadata["dagster/column_schema"].columns}
    assert created - set(lineage) <= {"site_url"}


# Progress


def test_a_long_interval_tells_how_far_it_is_how_fast_and_about_how_long_it_will_take(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, hour)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    done = run(export_of("events", target, hour), partition_key(hour))
    lines = [line for line in done.log if "rows/s" in line]
    assert lines
    assert all(f" of {ROWS:,} rows, " in line and line.endswith(" s left") for line in lines)
    assert lines[0].startswith("events [")
    assert f"{ROWS:,} of {ROWS:,} rows" in lines[-1]
    assert lines[-1].endswith("about 0 s left")


def test_a_short_interval_says_nothing_of_its_progress(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    done = run(export_of("events", target, hour), partition_key(hour))
    assert not [line for line in done.log if "rows/s" in line]


def test_a_merge_that_takes_long_says_when_it_begins(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_persons(source, hour)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    done = run(export_of("persons", target, hour), partition_key(hour))
    assert [line for line in done.log if "they are merged now" in line]


def test_lines_of_progress_are_half_a_minute_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        telling = Progress("events", lambda: 10_000, logging.getLogger("progress"))
        for second in range(1, 101):
            now = float(second)
            telling.tell(50 * second)
    assert [record.getMessage() for record in caplog.records] == [
        f"events: {rows:,} of 10,000 rows, 50 rows/s, about {(10_000 - rows) // 50} s left"
        for rows in (1_500, 3_000, 4_500)
    ]


def test_a_run_whose_rows_cannot_be_counted_goes_on_and_tells_its_rate_alone(caplog: pytest.LogCaptureFixture) -> None:
    def count() -> int:
        raise PassingError("Too many simultaneous queries.")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(progress, "EVERY", 0.0)
        telling = Progress("events", count, logging.getLogger("progress"))
        for rows in (100, 200):
            telling.tell(rows)
    why, *lines = [record.getMessage() for record in caplog.records]
    assert "Too many simultaneous queries." in why
    assert [line.partition(" rows, ")[0] for line in lines] == ["events: 100", "events: 200"]
    assert not any("left" in line for line in lines)


# Freshness


@pytest.mark.parametrize(
    ("interval", "warns", "fails"),
    [
        ("every 5 minutes", timedelta(minutes=12.5), timedelta(minutes=22.5)),
        ("hour", timedelta(minutes=95), timedelta(minutes=160)),
        ("day", timedelta(hours=36, minutes=5), timedelta(hours=60, minutes=10)),
    ],
)
def test_an_export_is_late_when_one_run_is_missing_and_fails_when_two_are(
    interval: IntervalLength, warns: timedelta, fails: timedelta
) -> None:
    policy: Any = freshness(interval)
    assert (policy.warn_window.to_timedelta(), policy.fail_window.to_timedelta()) == (warns, fails)


def test_an_export_has_its_freshness_policy_unless_it_is_paused(target: Target, hour: datetime) -> None:
    def policy(export: PostgresExport) -> dg.FreshnessPolicy | None:
        [asset] = export.build_defs(None).assets or []
        assert isinstance(asset, dg.AssetsDefinition)
        return asset.get_asset_spec().freshness_policy

    assert policy(export_of("events", target, hour)) == freshness("hour")
    assert policy(export_of("events", target, hour, paused=True)) is None
