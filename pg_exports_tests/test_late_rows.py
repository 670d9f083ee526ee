"""The sensor that finds rows which became visible after their interval had run, and requests a run of that interval."""

import contextlib
import gc
import json
import logging
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.scheduler.instigation import SensorInstigatorData
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.load_target import ModuleTarget
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._grpc.impl import get_external_sensor_execution

from pg_exports import PostgresExport, PostgresIOManager, late_rows
from pg_exports.partitions import IntervalLength
from pg_exports.postgres.watchdog import open_sockets
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import (
    BY_MONTH,
    HOUR,
    event,
    export_of,
    insert_sessions,
    mapping,
    new_session,
    person,
    session,
)

NOTHING_EXPORTED = "None of the latest intervals has been exported to the table that is there now."

MINUTE = timedelta(minutes=1)

VISITS: Any = {
    "name": "visits",
    "query": "SELECT id, state, at FROM visits WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"id": "TEXT", "state": "TEXT", "at": "TIMESTAMPTZ"},
    "key": ["id"],
    "version": ["at"],
}


@contextlib.contextmanager
def sensor_of(
    export: PostgresExport, source: Source, target: Target, cursor: str | None, instance: dg.DagsterInstance | None
) -> Iterator[tuple[dg.SensorDefinition, dg.SensorEvaluationContext]]:
    """The sensor with the resources that it has declared and no other."""
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
    with contextlib.ExitStack() as opened:
        if instance is None:
            instance = opened.enter_context(dg.DagsterInstance.ephemeral())
        context = opened.enter_context(
            dg.build_sensor_context(
                instance=instance,
                repository_def=repository,
                sensor_name=sensor.name,
                resources=declared,
                cursor=cursor,
            )
        )
        yield sensor, context


def look(
    export: PostgresExport,
    source: Source,
    target: Target,
    cursor: str | None = None,
    instance: dg.DagsterInstance | None = None,
) -> Any:
    """What the sensor does now, without memory of earlier ticks unless a cursor is given."""
    with sensor_of(export, source, target, cursor, instance) as (sensor, context):
        return sensor.evaluate_tick(context)


def asked(export: PostgresExport, source: Source, target: Target) -> list[str]:
    """The partitions that the sensor requests; without any it says why."""
    tick = look(export, source, target)
    keys = [request.partition_key for request in tick.run_requests]
    assert bool(tick.skip_message) is not bool(keys)
    return keys


def test_the_intervals_that_gained_events_are_requested_and_their_runs_bring_them(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    assert look(export, source, target).skip_message == NOTHING_EXPORTED
    source.insert("events", event(hour), event(hour - 2 * HOUR))
    assert run(export, partition_key(hour - 2 * HOUR), partition_key(hour)).counts == (2, 0, 0)
    quiet = look(export, source, target)
    assert quiet.run_requests == []
    assert quiet.skip_message == "No late rows in 3 of the latest 3 intervals."
    source.insert("events", event(hour + HOUR / 2), event(hour - HOUR))
    late = [partition_key(hour - HOUR), partition_key(hour)]
    assert asked(export, source, target) == late
    for key in late:
        assert run(export, key).counts[0] == 1
    assert asked(export, source, target) == []
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(4, 4)]


# Merged models


def people(source: Source, hour: datetime, moment: datetime) -> None:
    """A new person, and one whose profile changes."""
    new = uuid.uuid4()
    source.insert("person", person(moment, new, 1), person(moment, uuid.UUID(int=1), 2, properties='{"late": 1}'))
    source.insert("person_distinct_id2", mapping(moment, "late", new))


def more_sessions(source: Source, hour: datetime, moment: datetime) -> None:
    """A new session, and one that goes on."""
    insert_sessions(source, session(new_session(hour), moment, distinct_id="late"))
    insert_sessions(source, session(uuid.UUID(int=SESSION), moment, started=hour, ended=moment, distinct_id="late"))


def more_visits(source: Source, hour: datetime, moment: datetime) -> None:
    """A new visit, and one in another version."""
    for one in ("late", "0"):
        source.insert("visits", {"id": one, "state": "late", "at": moment, "inserted_at": moment})


SESSION = new_session(datetime(2026, 11, 1, tzinfo=UTC)).int


def first_rows(source: Source, model: str, hour: datetime) -> None:
    """Three rows of the hour, one of which has its latest state in the next one."""
    for number in range(3):
        one = uuid.UUID(int=number + 1)
        moments = (hour + number * MINUTE, *([hour + HOUR] if number == 2 else []))
        for version, moment in enumerate(moments, start=1):
            source.insert("person", person(moment, one, version))
            source.insert("visits", {"id": str(number), "state": "early", "at": moment, "inserted_at": moment})
            started = hour if number else datetime(2026, 11, 1, tzinfo=UTC)
            session_id = uuid.UUID(int=SESSION) if number == 0 else uuid.UUID(int=SESSION + number)
            insert_sessions(source, session(session_id, moment, started=started, ended=moment))
        source.insert("person_distinct_id2", mapping(moments[0], str(number), one))


@pytest.fixture
def visits(source: Source) -> None:
    source.execute(
        "CREATE TABLE visits (id String, state String, at DateTime64(6, 'UTC'), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY id"
    )


MERGED = {"persons": people, "sessions": more_sessions, "visits": more_visits}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.usefixtures("visits")
def test_late_rows_of_a_merged_model_are_found_and_rows_that_moved_on_are_not_late(
    source: Source, target: Target, run: RunExport, hour: datetime, name: str
) -> None:
    model: Any = VISITS if name == "visits" else name
    export = export_of(model, target, hour)
    first_rows(source, name, hour)
    assert run(export, partition_key(hour)).error is None
    assert run(export, partition_key(hour + HOUR)).error is None
    assert asked(export, source, target) == []
    # Seen by the hour that follows; in ClickHouse the older version is merged away.
    source.execute("OPTIMIZE TABLE person FINAL")
    assert asked(export, source, target) == []
    MERGED[name](source, hour, hour + 58 * MINUTE)
    assert asked(export, source, target) == [partition_key(hour)]
    inserted, updated, _ = run(export, partition_key(hour)).counts
    assert (inserted, updated) == (1, 1)
    assert asked(export, source, target) == []


@pytest.mark.usefixtures("visits")
def test_an_interval_of_a_merged_model_that_is_as_it_was_at_the_last_tick_is_not_read_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    first_rows(source, "persons", hour)
    assert run(export, partition_key(hour)).error is None
    first = look(export, source, target)
    # The run, the fingerprint and the states. ClickHouse logs a query a moment after its answer.
    eventually(lambda: len(source.columns_read("persons")) == 3)
    second = look(export, source, target, first.cursor)
    eventually(lambda: len(source.columns_read("persons")) == 4)
    assert second.run_requests == []


def test_rows_that_were_set_aside_are_not_late(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    one = uuid.UUID(int=1)
    source.insert("person", person(hour, one, 2**31), person(hour, uuid.UUID(int=2), 1))
    source.insert("person_distinct_id2", mapping(hour, "bad", one), mapping(hour, "good", uuid.UUID(int=2)))
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert asked(export, source, target) == []


# Attempts


def minutes_later(cursor: str, minutes: int) -> str:
    """The cursor as it is some minutes later: what it remembers is older."""
    kept = json.loads(cursor)
    for attempt in kept["attempts"].values():
        attempt["at"] -= 60 * minutes
    return json.dumps(kept)


def test_a_run_is_requested_again_while_its_rows_are_late_with_longer_and_longer_waits(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    source.insert("events", event(hour))
    cursor, keys, times = None, [], []
    for minutes in range(0, 200, 5):
        tick = look(export, source, target, cursor)
        cursor = minutes_later(tick.cursor, 5)
        keys += [request.run_key for request in tick.run_requests]
        times += [minutes for _ in tick.run_requests]
    assert times == [0, 10, 30, 70, 150]
    assert len(set(keys)) == 5
    # Other rows are another reason.
    source.insert("events", event(hour))
    [other] = look(export, source, target, cursor).run_requests
    assert other.run_key not in keys
    assert other.tags["pg_exports/reason"] == "late rows"


def test_no_run_is_requested_while_one_is_under_way(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    source.insert("events", event(hour))
    with dg.DagsterInstance.ephemeral() as instance:
        job = export.build_defs(None).jobs
        assert job
        instance.create_run_for_job(
            dg.Definitions(jobs=[_NOTHING]).get_job_def("events_job"),
            tags={"dagster/partition": partition_key(hour), **late_rows.TAGS},
            status=dg.DagsterRunStatus.STARTED,
        )
        assert look(export, source, target, None, instance).run_requests == []


@dg.op
def _nothing() -> None: ...


@dg.job(name="events_job")
def _NOTHING() -> None:  # noqa: N802 - a stand-in for the export's job in the instance's storage
    _nothing()


# What was a blind spot


def test_late_rows_of_an_export_that_was_renamed_are_found(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", event(hour))
    renamed = export_of("events", target, hour, name="renamed", table="events")
    assert asked(renamed, source, target) == [partition_key(hour)]
    assert run(renamed, partition_key(hour)).counts == (1, 0, 1)
    assert asked(renamed, source, target) == []


@pytest.mark.parametrize("statements", [(), BY_MONTH], ids=["plain", "partitioned"])
def test_late_rows_of_a_table_that_was_rewritten_are_found_before_and_after_the_next_run(
    source: Source, target: Target, run: RunExport, hour: datetime, statements: tuple[str, ...]
) -> None:
    source.insert("events", event(hour))
    target.execute(*statements)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert asked(export, source, target) == []
    source.insert("events", event(hour), event(hour + HOUR))
    target.execute("VACUUM FULL events")
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour + HOUR)).counts == (1, 0, 0)
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour)).counts == (1, 0, 1)


def test_an_interval_that_dagster_shows_and_a_failover_has_lost_is_requested(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR), event(hour))
    export = export_of("events", target, hour)
    for key in (partition_key(hour - HOUR), partition_key(hour)):
        assert run(export, key).counts == (1, 0, 0)
    # As a standby is that became the primary before it had the last commit.
    target.execute(
        f"DELETE FROM pg_exports_ledger WHERE interval_start = '{hour}'",
        f"DELETE FROM pg_exports_keys WHERE interval_start = '{hour}'",
        "DELETE FROM events WHERE uuid IN (SELECT uuid FROM events ORDER BY ctid DESC LIMIT 1)",
    )
    with dg.DagsterInstance.ephemeral() as instance:
        assert look(export, source, target, None, instance).run_requests == []
        instance.report_runless_asset_event(dg.AssetMaterialization("events", partition=partition_key(hour)))
        [request] = look(export, source, target, None, instance).run_requests
    assert request.partition_key == partition_key(hour)
    # The table is asked, as it may still have rows.
    assert run(export, partition_key(hour), run_config=request.run_config).counts == (1, 0, 0)
    assert run(export, partition_key(hour), run_config=request.run_config).counts == (0, 0, 1)


@pytest.mark.usefixtures("visits")
def test_late_rows_that_a_failover_has_lost_after_a_tick_had_seen_them_are_found(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("persons", target, hour)
    first_rows(source, "persons", hour)
    assert run(export, partition_key(hour)).error is None
    tables = ("persons", "pg_exports_ledger", "pg_exports_keys", "pg_exports_tables")
    target.execute(*(f"CREATE TABLE kept_{table} AS SELECT * FROM {table}" for table in tables))
    people(source, hour, hour + 58 * MINUTE)
    assert run(export, partition_key(hour)).counts[:2] == (1, 1)
    quiet = look(export, source, target)
    assert quiet.run_requests == []
    # As a standby is that became the primary before it had the last commit.
    for table in tables:
        target.execute(
            f"DELETE FROM {table}", f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM kept_{table}"
        )
    [request] = look(export, source, target, quiet.cursor).run_requests
    assert request.partition_key == partition_key(hour)
    assert run(export, partition_key(hour)).counts[:2] == (1, 1)


# How much is looked at


def test_a_tick_looks_at_as_many_intervals_as_it_can_afford_and_the_next_one_goes_on(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = [hour - n * HOUR for n in range(5, -1, -1)]
    for each in hours:
        source.insert("events", event(each), event(each))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hours[0]), partition_key(hours[-1])).counts == (12, 0, 0)
    monkeypatch.setattr(late_rows, "ROWS_A_TICK", 5)
    monkeypatch.setattr(late_rows, "ROWS_A_QUERY", 3)
    for each in hours:
        source.insert("events", event(each))
    cursor, found = None, []
    for _ in range(3):
        tick = look(export, source, target, cursor)
        cursor = tick.cursor
        found.append([request.partition_key for request in tick.run_requests])
    assert found == [[partition_key(each) for each in some] for some in (hours[:2], hours[2:4], hours[4:])]


def test_an_interval_with_more_rows_than_a_query_looks_at_is_asked_for_in_parts(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.insert("events", *(event(hour, distinct_id=str(number)) for number in range(50)))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (50, 0, 0)
    monkeypatch.setattr(late_rows, "ROWS_A_QUERY", 20)
    before = len(source.columns_read("events"))
    assert asked(export, source, target) == []
    assert len(source.columns_read("events")) - before == 3


def test_what_is_looked_at_is_a_window_in_time(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    export = export_of("events", target, hour, late_rows_days=1, start=hour - 100 * HOUR)
    old, new = hour - 30 * HOUR, hour - 20 * HOUR
    for key in (old, new):
        assert run(export, partition_key(key)).error is None
    source.insert("events", event(old), event(new))
    assert asked(export, source, target) == [partition_key(new)]
    longer = export_of("events", target, hour, late_rows_days=3, start=hour - 100 * HOUR)
    assert asked(longer, source, target) == [partition_key(old), partition_key(new)]


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


def test_intervals_that_follow_each_other_are_looked_at_in_one_query_that_reads_no_properties(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    run(export, partition_key(hour - 10 * HOUR), partition_key(hour))
    source.insert("events", event(hour - 10 * HOUR), event(hour))
    before = len(source.columns_read("events"))
    assert asked(export, source, target) == [partition_key(hour - 10 * HOUR), partition_key(hour)]
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
    settings: dict[str, Any] = {"interval": "day", "timezone": "Asia/Kolkata", "offset_hour": 5}
    day = datetime.now(UTC).replace(hour=23, minute=30, second=0, microsecond=0) - timedelta(days=3)
    settings["late_rows_days"] = 5
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


# In a deployment


def test_a_code_server_keeps_no_connection_of_a_tick(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).error is None
    resources = {
        "clickhouse": source.resource(),
        "postgres_io_manager": PostgresIOManager(postgres=target.resource()),
    }
    repository = dg.Definitions.merge(export.build_defs(None), dg.Definitions(resources=resources)).get_repository_def()
    origin = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="unused"))
    # What earlier tests have left is not to go in the midst of this one.
    gc.collect()
    with dg.instance_for_test() as instance:
        ticks = [
            (
                get_external_sensor_execution(
                    repository, origin, instance.get_ref(), "events_late_rows", None, None, None, None, None
                ),
                len(open_sockets()),
            )
            for _ in range(4)
        ]
    assert all(isinstance(done, SensorExecutionData) and done.cursor for done, _ in ticks)
    (_, first), *_, (_, last) = ticks
    assert last <= first


def test_the_daemon_requests_late_rows_of_every_model_again_until_a_run_has_brought_them(
    sandbox: Sandbox,
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first runs of merged models fail, as the role may make no staging table; of the events the sensor itself is refused.
    Once they are not, the next ones bring the rows.
    """
    for name, value in (sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    source.execute(
        "CREATE TABLE visits (id String, state String, at DateTime64(6, 'UTC'), inserted_at DateTime64(6, 'UTC'))"
        " ENGINE = MergeTree ORDER BY id"
    )
    names = ("events", "persons", "sessions", "visits")
    first_rows(source, "all", hour)
    source.insert("events", event(hour))
    for name in names:
        model: Any = VISITS if name == "visits" else name
        assert run(export_of(model, target, hour), partition_key(hour)).error is None
    package = f"project_{uuid.uuid4().hex}"
    (tmp_path / f"{package}.py").write_text(PROJECT.format(hour=hour - 24 * HOUR, schema=target.schema, visits=VISITS))
    monkeypatch.syspath_prepend(str(tmp_path))
    code = ModuleTarget(package, None, str(tmp_path), tmp_path.name)
    began = datetime.now(UTC)
    with (
        dg.instance_for_test(overrides=AT_ONCE, temp_dir=str(tmp_path)) as instance,
        create_test_daemon_workspace_context(code, instance) as workspace,
    ):

        def runs() -> list[dg.DagsterRun]:
            found = instance.get_runs(dg.RunsFilter(tags=late_rows.TAGS))
            return [one for one in found if one.tags["dagster/partition"] == partition_key(hour)]

        def tick(minutes: int) -> None:
            with freeze_time(began + minutes * MINUTE):
                list(execute_sensor_iteration(workspace, logging.getLogger("daemon"), None, None))

        def have_ended(count: int) -> bool:
            return len(runs()) == count and all(one.is_finished for one in runs())

        tick(0)
        assert runs() == []
        source.insert("events", event(hour))
        for more in MERGED.values():
            more(source, hour, hour + 58 * MINUTE)
        target.execute(
            f"REVOKE CREATE ON SCHEMA {target.schema} FROM {ROLE}",
            "ALTER TABLE events ADD needed int NOT NULL DEFAULT 0",
            "ALTER TABLE events ALTER needed DROP DEFAULT",
        )
        tick(11)
        eventually(lambda: have_ended(3), seconds=120)
        assert {one.status for one in runs()} == {dg.DagsterRunStatus.FAILURE}
        target.execute(f"GRANT CREATE ON SCHEMA {target.schema} TO {ROLE}", "ALTER TABLE events DROP needed")
        tick(22)
        eventually(lambda: have_ended(4), seconds=120)
        for state in instance.all_instigator_state():
            data = state.instigator_data
            if isinstance(data, SensorInstigatorData) and data.cursor:
                instance.update_instigator_state(state.with_data(data._replace(cursor=minutes_later(data.cursor, 10))))
        tick(33)
        eventually(lambda: have_ended(7), seconds=120)
        tick(60)
        assert len(runs()) == 7
    assert target.count("events") == 2
    # Of the sessions one has moved on to the next hour.
    assert [target.count(name) for name in ("persons", "sessions", "visits")] == [4, 3, 4]


AT_ONCE = {"run_coordinator": {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"}}
"""Without a queue, which another daemon would have to empty."""

PROJECT = """
import dagster as dg
from pg_exports import PostgresExport
from pg_exports.defs import resources

visits = {visits!r}
exports = [
    PostgresExport(model=model, team_id=1, start="{hour:%Y-%m-%dT%H:%M}", schema="{schema}")
    for model in ("events", "persons", "sessions", visits)
]
defs = dg.Definitions.merge(resources.connections(), *(export.build_defs(None) for export in exports))
"""
