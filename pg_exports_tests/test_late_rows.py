"""The sensor that finds events which became visible after their interval had run, and asks for that interval again."""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from pg_exports import PostgresExport, PostgresIOManager
from pg_exports.partitions import IntervalLength
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of

NOTHING_EXPORTED = "None of the latest intervals has been exported to the table that is there now."


def look(export: PostgresExport, source: Source, target: Target) -> Any:
    """What the sensor does now, with the resources that it has declared and no other."""
    postgres = target.resource()
    resources = {
        "clickhouse": source.resource(),
        "postgres": postgres,
        "postgres_io_manager": PostgresIOManager(postgres=postgres),
    }
    defs = dg.Definitions.merge(export.build_defs(None), dg.Definitions(resources=resources))
    repository = defs.get_repository_def()
    sensor = repository.get_sensor_def(f"{export.key}_late_rows")
    declared = {key: resource for key, resource in resources.items() if key in sensor.required_resource_keys}
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(
            instance=instance, repository_def=repository, sensor_name=sensor.name, resources=declared
        ) as context,
    ):
        return sensor.evaluate_tick(context)


def asked(export: PostgresExport, source: Source, target: Target) -> list[str]:
    """The partitions that the sensor asks for; without any it says why."""
    tick = look(export, source, target)
    keys = [request.partition_key for request in tick.run_requests]
    assert bool(tick.skip_message) is not bool(keys)
    return keys


def test_the_intervals_that_gained_events_are_asked_for_and_their_runs_bring_them(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    assert look(export, source, target).skip_message == NOTHING_EXPORTED
    source.insert("events", event(hour), event(hour - 2 * HOUR))
    assert run(export, partition_key(hour - 2 * HOUR), partition_key(hour)).counts == (2, 0, 0)
    quiet = look(export, source, target)
    assert quiet.run_requests == []
    assert "No late events in the latest 3 intervals" in quiet.skip_message
    source.insert("events", event(hour + HOUR / 2), event(hour - HOUR))
    late = [partition_key(hour - HOUR), partition_key(hour)]
    assert asked(export, source, target) == late
    for key in late:
        assert run(export, key).counts[0] == 1
    assert asked(export, source, target) == []
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(4, 4)]


def test_a_run_is_asked_for_once_for_the_same_events_and_again_for_others(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    source.insert("events", event(hour))
    [first] = look(export, source, target).run_requests
    [same] = look(export, source, target).run_requests
    source.insert("events", event(hour))
    [other] = look(export, source, target).run_requests
    assert first.run_key == same.run_key != other.run_key
    assert {request.partition_key for request in (first, same, other)} == {partition_key(hour)}
    assert first.tags["pg_exports/reason"] == "late events"


def test_what_the_export_does_not_export_asks_for_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour, exclude_events=["$pageleave"])
    here = event(hour)
    source.insert("events", here)
    run(export, partition_key(hour))
    source.execute("SYSTEM STOP MERGES events")
    source.insert("events", event(hour, team_id=TEAM + 1), event(hour, event="$pageleave"))
    source.insert("events", here, here | {"inserted_at": hour + HOUR / 2, "properties": '{"again": 1}'})
    # Never exported: before the first run, and since the last one.
    source.insert("events", event(hour - HOUR), event(hour + HOUR), event(datetime.now(UTC)))
    assert asked(export, source, target) == []
    source.insert("events", event(hour))
    assert asked(export, source, target) == [partition_key(hour)]


def test_the_latest_24_intervals_are_looked_at_in_one_query_that_reads_no_properties(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    older, oldest, newest = (today - timedelta(days=n) for n in (25, 24, 1))
    days = [f"{day:%Y-%m-%d}" for day in (older, oldest, newest)]
    export = export_of("events", target, hour, interval="day", start=(today - timedelta(days=30)).date())
    run(export, days[0], days[1])
    run(export, days[2])
    source.insert("events", event(older + 23 * HOUR), event(oldest), event(newest + 23 * HOUR))
    before = len(source.columns_read("events"))
    assert asked(export, source, target) == days[1:]
    [columns] = source.columns_read("events")[before:]
    assert "uuid" in columns
    assert not {"properties", "person_properties", "elements_chain"} & columns


def test_of_a_table_that_is_empty_again_or_gone_nothing_is_asked_for(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    source.insert("events", event(hour))
    assert asked(export, source, target) == [partition_key(hour)]
    for statement in ("TRUNCATE events", "DROP TABLE events"):
        target.execute(statement)
        assert look(export, source, target).skip_message == NOTHING_EXPORTED


def test_the_sensor_of_an_inline_connection_looks_where_the_export_writes(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    inline = {
        "host": HOST,
        "port": target.sandbox.postgres.port,
        "user": ROLE,
        "password": target.sandbox.password,
        "root_certificate": str(target.sandbox.certificates.authority),
    }
    export = export_of("events", target, hour, connection=inline, database=DATABASE)
    assert run(export, partition_key(hour)).error is None
    assert asked(export, source, target) == []
    source.insert("events", event(hour))
    assert asked(export, source, target) == [partition_key(hour)]


def test_days_and_five_minutes_have_their_own_late_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    settings = {"interval": "day", "timezone": "Asia/Kolkata", "offset_hour": 5}
    day = datetime.now(UTC).replace(hour=23, minute=30, second=0, microsecond=0) - timedelta(days=3)
    first, second = (f"{day + timedelta(days=n):%Y-%m-%d}" for n in (1, 2))
    daily = export_of("events", target, day, start=first, **settings)
    now = datetime.now(UTC)
    five = now.replace(minute=now.minute // 5 * 5, second=0, microsecond=0) - timedelta(minutes=30)
    short = export_of("events", target, hour, name="short", table="short", interval="every 5 minutes")
    assert run(daily, first).error is None
    assert run(short, partition_key(five)).error is None
    source.insert("events", event(day), event(day + 24 * HOUR), event(five + timedelta(minutes=4)))
    assert asked(short, source, target) == [partition_key(five)]
    assert asked(daily, source, target) == [first]
    assert run(daily, first, second).error is None
    assert asked(daily, source, target) == []


def test_an_interval_of_another_length_is_none_that_was_exported(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """An export whose `interval` was changed has run none of the new ones, though some begin where an old one did."""
    source.insert("events", event(hour), event(hour + HOUR / 2))
    run(export_of("events", target, hour, interval="every 5 minutes"), partition_key(hour))
    assert look(export_of("events", target, hour), source, target).skip_message == NOTHING_EXPORTED


@pytest.mark.parametrize(
    ("interval", "seconds"),
    [("every 5 minutes", 300), ("every 15 minutes", 300), ("hour", 600), ("day", 3600), ("week", 3600)],
)
def test_the_sensor_runs_as_often_as_its_intervals_end_unless_the_export_is_paused(
    interval: IntervalLength, seconds: int
) -> None:
    for paused, status in ((False, dg.DefaultSensorStatus.RUNNING), (True, dg.DefaultSensorStatus.STOPPED)):
        export = PostgresExport(model="events", team_id=TEAM, start="2026-11-15", interval=interval, paused=paused)
        [sensor] = export.build_defs(None).sensors or []
        assert isinstance(sensor, dg.SensorDefinition)
        assert (sensor.default_status, sensor.minimum_interval_seconds) == (status, seconds)
        assert sensor.job_name == "events_job"


def test_models_that_are_merged_have_no_such_sensor() -> None:
    persons = PostgresExport(model="persons", team_id=TEAM, start="2026-11-20")
    sessions = PostgresExport(model="sessions", team_id=TEAM, start="2026-11-20")
    assert not persons.build_defs(None).sensors
    assert not sessions.build_defs(None).sensors
