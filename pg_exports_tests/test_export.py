"""An export as a user writes it, in YAML and in Python: what it becomes, and how it is refused."""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType
from pydantic import ValidationError

from pg_exports import ClickHouseResource, PostgresExport, PostgresIOManager, PostgresResource
from pg_exports.defs.resources import connections
from pg_exports.errors import SettingsError
from pg_exports.models import MODELS
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports.schedule import _is_code_server
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, materialise, partition_key
from pg_exports_tests.source_rows import event
from pg_exports_tests.yaml_exports import REQUIRED, Load, assets, project, refusal, said, yaml

HOUR = timedelta(hours=1)
SECRET = "s3cret-p'ss\"word\\"
INLINE = {"host": "db.example", "user": "writer", "password": SECRET}


def python(**changes: Any) -> PostgresExport:
    return PostgresExport(**(REQUIRED | changes))


def asset(export: PostgresExport) -> dg.AssetsDefinition:
    [found] = export.build_defs(None).assets or []
    assert isinstance(found, dg.AssetsDefinition)
    return found


# What an export becomes


def test_an_export_of_three_attributes_has_the_defaults() -> None:
    export = python()
    spec = asset(export).get_asset_spec()
    assert spec.key == dg.AssetKey("events")
    assert spec.group_name == "pg_exports"
    assert spec.kinds == {"clickhouse", "polars", "postgres"}
    assert spec.owners == ["team:pg_exports"]
    assert spec.description == f'{MODELS["events"].description} Team 7, into "public"."events".'
    assert spec.metadata["dagster/table_name"] == "public.events"
    assert [column.name for column in spec.metadata["dagster/column_schema"].columns] == [
        column.name for column in MODELS["events"].columns if not column.optional
    ]
    assert isinstance(spec.partitions_def, dg.TimeWindowPartitionsDefinition)
    assert spec.partitions_def.cron_schedule == "0 * * * *"
    assert str(spec.partitions_def.timezone) == "UTC"
    assert asset(export).backfill_policy == dg.BackfillPolicy.single_run()
    assert asset(export).op.pool == "postgres"
    assert asset(export).required_resource_keys >= {"clickhouse", "postgres_io_manager"}
    definitions = export.build_defs(None)
    assert [job.name for job in definitions.jobs or []] == ["events_job", "events_check", "events_verify"]
    assert [schedule.name for schedule in definitions.schedules or []] == ["events_schedule"]


@pytest.mark.parametrize(("settings", "most"), [({}, 720), ({"max_partitions_per_run": 24}, 24)])
def test_a_code_server_tells_of_backfills_in_several_runs(settings: dict[str, Any], most: int) -> None:
    # As it does when it loads the definitions for the first time, and then again.
    first, then = DefinitionsLoadType.INITIALIZATION, DefinitionsLoadType.RECONSTRUCTION
    _is_code_server.cache_clear()
    try:
        for load_type in (first, then):
            with DefinitionsLoadContext.scoped(DefinitionsLoadContext(load_type=load_type)):
                assert asset(python(**settings)).backfill_policy == dg.BackfillPolicy.multi_run(most)
    finally:
        _is_code_server.cache_clear()


def test_every_attribute_can_be_set_in_yaml_and_in_python(load: Load) -> None:
    every: dict[str, Any] = {
        "name": "weekly_eu",
        "model": "events",
        "team_id": 9,
        "interval": "week",
        "start": "2026-11-17",
        "timezone": "Europe/Berlin",
        "offset_hour": 4,
        "offset_day": 2,
        "include_events": ["$pageview", 'it\'s "quoted"'],
        "exclude_events": ["$autocapture"],
        "database": "warehouse",
        "schema": "analytics",
        "table": 'my "events"',
        "connection": "postgres_eu",
        "on_bad_rows": "reject",
        "deduplicate": "interval",
        "streams": 4,
        "max_partitions_per_run": 8,
        "paused": True,
    }
    in_python = PostgresExport(**every)
    in_yaml = load(yaml(**every))
    [spec] = assets(in_yaml).values()
    ours = asset(in_python).get_asset_spec()
    assert (spec.key, spec.description, spec.partitions_def) == (ours.key, ours.description, ours.partitions_def)
    assert {name: spec.metadata[name] for name in ours.metadata} == dict(ours.metadata)
    assert spec.metadata["dagster/table_name"] == 'warehouse.analytics.my "events"'
    assert isinstance(spec.partitions_def, dg.TimeWindowPartitionsDefinition)
    assert spec.partitions_def.cron_schedule == "0 4 * * 2"
    [schedule] = in_yaml.schedules or []
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert schedule.name == "weekly_eu_schedule"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert asset(in_python).op.pool == "postgres_eu"
    assert asset(in_python).required_resource_keys >= {"clickhouse", "postgres_eu_io_manager"}
    assert in_python.include_events == every["include_events"]
    assert (in_python.on_bad_rows, in_python.streams, in_python.max_partitions_per_run) == ("reject", 4, 8)


@pytest.mark.parametrize(
    "start", ["2026-11-20", "2026-11-20T00:00:00", "2026-11-20 00:00:00Z", '"2026-11-20T01:00+01:00"']
)
def test_start_may_be_written_in_yaml_with_and_without_quotes(load: Load, start: str) -> None:
    [spec] = assets(load(f"model: events\nteam_id: 1\nstart: {start}")).values()
    assert isinstance(spec.partitions_def, dg.TimeWindowPartitionsDefinition)
    assert spec.partitions_def.start == datetime(2026, 11, 20, tzinfo=UTC)


@pytest.mark.parametrize("start", [date(2026, 11, 20), datetime(2026, 11, 20, tzinfo=UTC), datetime(2026, 11, 20)])
def test_start_may_be_a_date_or_a_datetime_in_python(start: date) -> None:
    partitions = asset(python(start=start)).partitions_def
    assert isinstance(partitions, dg.TimeWindowPartitionsDefinition)
    assert partitions.start == datetime(2026, 11, 20, tzinfo=UTC)


def test_a_text_in_yaml_that_looks_like_something_else_stays_a_text(
    load: Load, source: Source, target: Target, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOTHER", "purchase")
    names = ["123", "1e5", "[1]", '{"a": 1}', "None", "True", "{{ env.ANOTHER }}"]
    for name in [*(name for name in names if "env" not in name), "purchase", "other"]:
        source.insert("events", event(hour, event=name))
    definitions = load(yaml(team_id=TEAM, start=f"{hour:%Y-%m-%d}", schema=target.schema, include_events=names))
    postgres = target.resource()
    mine = {"clickhouse": source.resource(), "postgres_io_manager": PostgresIOManager(postgres=postgres)}
    loaded = dg.Definitions.merge(definitions, dg.Definitions(resources=mine))
    result = loaded.resolve_implicit_global_asset_job_def().execute_in_process(partition_key=partition_key(hour))
    assert result.success
    landed = {name for (name,) in target.rows("SELECT event FROM events")}
    assert landed == {*names, "purchase"} - {"{{ env.ANOTHER }}"}


def test_two_exports_of_a_model_stand_side_by_side(load: Load) -> None:
    definitions = load(yaml(), yaml(name="events_daily", table="daily", interval="day"), yaml(model="persons"))
    names = {"events", "events_daily", "persons"}
    assert set(assets(definitions)) == names
    assert {job.name for job in definitions.jobs or []} == {
        f"{name}_{what}" for name in names for what in ("job", "check", "verify")
    }
    assert assets(definitions)["events_daily"].metadata["dagster/table_name"] == "public.daily"
    merged = dg.Definitions.merge(definitions, dg.Definitions(resources=resources()))
    dg.Definitions.validate_loadable(merged)


def resources() -> dict[str, Any]:
    postgres = PostgresResource(host="unused", user="unused", database="unused")
    return {
        "clickhouse": ClickHouseResource(host="unused"),
        "postgres": postgres,
        "postgres_io_manager": PostgresIOManager(postgres=postgres),
    }


def test_a_connection_that_is_not_there_is_named() -> None:
    definitions = dg.Definitions.merge(
        python(connection="postgres_eu").build_defs(None), dg.Definitions(resources=resources())
    )
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="'postgres_eu_io_manager'"):
        dg.Definitions.validate_loadable(definitions)


# Wrong attributes

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modell": "events"}, "`modell`: there is no such attribute"),
    ({"columns": {"plan": 5}}, "plan: must be false, true, a name, or an expression"),
    ({"model": "groups"}, "`model`: Input should be 'events', 'persons' or 'sessions'"),
    ({"on_bad_rows": "ignore"}, "`on_bad_rows`: Input should be 'repair', 'reject' or 'fail'"),
    ({"deduplicate": True}, "`deduplicate`: Input should be 'interval', 'table' or 'replace'"),
    ({"model": "persons", "deduplicate": "table"}, "`deduplicate: table` is for `model: events`"),
    ({"team_id": "seven"}, "`team_id`: Input should be a valid integer"),
    ({"team_id": 1.5}, "`team_id"),
    ({"team_id": -1}, "`team_id` must be a team's number"),
    ({"team_id": 0}, "`team_id` must be a team's number"),
    ({"team_id": 2**63}, "`team_id`"),
    ({"team_id": None}, "`team_id"),
    (
        {"interval": "month"},
        "`interval`: Input should be 'hour', 'day', 'week', 'every 5 minutes' or 'every 15 minutes'",
    ),
    ({"start": "yesterday"}, "`start` 'yesterday' is neither an ISO date"),
    ({"start": 20261120}, "`start`: must be an ISO date"),
    ({"start": 1.5}, "`start`: must be an ISO date"),
    ({"start": None}, "`start"),
    (
        {"start": "2026-11-20T13:30"},
        "the boundaries around it are 2026-11-20T13:00:00+00:00 and 2026-11-20T14:00:00+00:00",
    ),
    ({"timezone": "Mars/Olympus"}, "`timezone` 'Mars/Olympus' is not known"),
    ({"interval": "day", "offset_hour": 24}, "`offset_hour` must be 0 to 23"),
    ({"interval": "day", "offset_hour": "noon"}, "`offset_hour`"),
    ({"offset_hour": 3}, "`offset_hour` is for `interval: day`"),
    ({"interval": "week", "offset_day": 7}, "`offset_day` 0 (Sunday) to 6"),
    ({"interval": "day", "offset_day": 1}, "`offset_day` is for `interval: week`"),
    ({"include_events": "$pageview"}, "`include_events`: Input should be a valid list"),
    ({"exclude_events": [1]}, "`exclude_events"),
    ({"model": "persons", "include_events": ["a"]}, "are for `model: events`"),
    ({"name": "my-events"}, "`name` must be letters, digits and underscores"),
    ({"name": ""}, "`name` must be letters, digits and underscores"),
    ({"schema": ""}, "`schema` is empty"),
    ({"table": ""}, "`table` is empty"),
    ({"table": "t" * 64}, "Postgres cuts names longer than 63"),
    ({"database": ""}, "`database` is empty"),
    ({"connection": ""}, "`connection` must be a resource key"),
    ({"connection": "my postgres"}, "`connection` must be a resource key"),
    ({"connection": INLINE}, "`database` is required with an inline `connection`"),
    ({"database": "d", "connection": {"host": "h", "password": SECRET}}, "`connection`: `user`: Field required"),
    (
        {"database": "d", "connection": INLINE | {"pasword": SECRET}},
        "`connection`: `pasword`: there is no such attribute",
    ),
    ({"database": "d", "connection": INLINE | {"password": [SECRET]}}, "`connection`: `password`"),
    (
        {"database": "d", "connection": INLINE | {"port": SECRET}},
        "`connection`: `port`: Input should be a valid integer",
    ),
    (
        {"database": "d", "connection": INLINE | {"verify_server_identity": "prefer"}},
        "`verify_server_identity`: Input should",
    ),
    ({"connection": [SECRET]}, "`connection"),
    ({"connection": 5432}, "`connection"),
    ({"paused": "perhaps"}, "`paused`"),
    ({"database": [SECRET]}, "`database"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value).replace(SECRET, "..."))
def test_a_wrong_attribute_in_yaml_is_one_error_with_the_exports_name(
    load: Load, wrong: dict[str, Any], message: str
) -> None:
    text = refusal(load, yaml(**({"name": "mine"} | wrong)))
    name = wrong.get("name", "mine") or "events"
    assert said(text).startswith(f"Export {name}: ")
    assert message in said(text)
    assert SECRET not in text
    assert "s3cret" not in text
    assert text.count("pg_exports.errors.SettingsError") == 1
    assert "pydantic" not in said(text)
    assert text.count("The above exception was caused by") == 1


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value).replace(SECRET, "..."))
def test_a_wrong_attribute_in_python_is_an_error_without_the_values(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, SettingsError)) as caught:
        python(**wrong).build_defs(None)
    if isinstance(caught.value, SettingsError):
        assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "team_id", "start"])
def test_a_missing_attribute_is_named_and_no_other_value_is_shown(load: Load, missing: str) -> None:
    written = "\n".join(
        line for line in yaml(database="d", connection=INLINE).split("\n") if not line.startswith(missing)
    )
    text = refusal(load, written)
    assert f"`{missing}`: Field required" in said(text)
    assert "s3cret" not in text


def test_a_misspelt_attribute_of_a_secret_does_not_show_it(load: Load) -> None:
    text = refusal(load, yaml(pasword=SECRET))
    assert "`pasword`: there is no such attribute" in said(text)
    assert "s3cret" not in text


# Template variables


def test_variables_are_filled_in(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TEAM", "42")
    monkeypatch.setenv("MY_SCHEMA", "it's mine")
    definitions = load(
        yaml(team_id="{{ env.MY_TEAM }}", schema="{{ env.MY_SCHEMA }}", table="{{ env.NOT_SET or 'fallback' }}")
    )
    [spec] = assets(definitions).values()
    assert spec.metadata["pg_exports/team_id"] == 42
    assert spec.metadata["dagster/table_name"] == "it's mine.fallback"


@pytest.mark.parametrize(
    "changes",
    [
        {"team_id": "{{ env.NOT_SET }}"},
        {"team_id": "{{env.NOT_SET}}"},
        {"start": "{{ env.NOT_SET }}"},
        {"include_events": ["{{ env.NOT_SET }}"]},
        {"table": "events_{{ env.NOT_SET }}"},
        {"database": "d", "connection": INLINE | {"password": "{{ env.NOT_SET }}"}},
        {"database": "d", "connection": INLINE | {"host": "{{ env.NOT_SET }}"}},
    ],
)
def test_a_missing_variable_names_export_and_variable(load: Load, changes: dict[str, Any]) -> None:
    text = refusal(load, yaml(**({"name": "mine"} | changes)))
    assert said(text).startswith("Export mine: the environment variable NOT_SET is not set.")
    assert "s3cret" not in text


def test_a_variable_that_is_no_number_is_an_error_without_its_value(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TEAM", SECRET)
    text = refusal(load, yaml(team_id="{{ env.MY_TEAM }}"))
    assert "Export events: `team_id`: Input should be a valid integer" in text
    assert "s3cret" not in text


# Inline connections


def inline(sandbox: Sandbox, **changes: Any) -> dict[str, Any]:
    return {
        "host": HOST,
        "port": sandbox.postgres.port,
        "user": ROLE,
        "password": sandbox.password,
        "root_certificate": str(sandbox.certificates.authority),
    } | changes


def insert_event(source: Source, hour: datetime, count: int = 1) -> None:
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
        " SELECT generateUUIDv4(number), 'tick', '{}', {at:DateTime64(6)}, {team:Int64}, 'a', {at:DateTime64(6)},"
        " {at:DateTime64(6)} FROM numbers({count:UInt64})",
        {"at": f"{hour:%Y-%m-%d %H:%M:%S}", "team": TEAM, "count": count},
    )


def everything_about(definitions: dg.Definitions, *exports: PostgresExport) -> str:
    """What Dagster and a debugger may show of an export: reprs, metadata, snapshots that go to the UI."""
    repository = dg.Definitions.merge(definitions, dg.Definitions(resources=resources())).get_repository_def()
    specs = assets(definitions).values()
    jobs = [dg.serialize_value(job.get_job_snapshot()) for job in repository.get_all_jobs()]
    return " ".join(map(repr, [*exports, *map(str, exports), *specs, *(dict(spec.metadata) for spec in specs), *jobs]))


def test_an_inline_connection_in_yaml_exports_and_shows_its_password_nowhere(
    load: Load, source: Source, target: Target, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLD_EXPORT_PASSWORD", target.sandbox.password)
    insert_event(source, hour)
    connection = inline(target.sandbox, password="{{ env.OLD_EXPORT_PASSWORD }}")
    definitions = load(
        yaml(team_id=TEAM, start=f"{hour:%Y-%m-%d}", schema=target.schema, database=DATABASE, connection=connection)
    )
    loaded = dg.Definitions.merge(definitions, dg.Definitions(resources={"clickhouse": source.resource()}))
    result = loaded.resolve_implicit_global_asset_job_def().execute_in_process(partition_key=partition_key(hour))
    assert result.success
    assert target.count("events") == 1
    shown = everything_about(definitions) + "".join(map(repr, result.all_events))
    assert target.sandbox.password not in shown


def test_an_inline_connection_in_python_exports_and_shows_its_password_nowhere(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_event(source, hour)
    export = python(
        team_id=TEAM, start=hour, schema=target.schema, database=DATABASE, connection=inline(target.sandbox)
    )
    nowhere = PostgresResource(host="unused", user="unused", database="unused")
    done = run(export, partition_key(hour), postgres=nowhere)
    assert done.counts == (1, 0, 0)
    shown = everything_about(export.build_defs(None), export) + f"{done.metadata} {done.log}"
    assert target.sandbox.password not in shown
    assert asset(export).op.pool == "postgres"


def test_an_inline_connection_that_is_refused_shows_no_password(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = python(
        team_id=TEAM,
        start=hour,
        schema=target.schema,
        database=DATABASE,
        connection=inline(target.sandbox, password=SECRET),
    )
    refused = run(export, partition_key(hour))
    assert refused.error is not None
    assert "password authentication failed" in refused.error
    assert "s3cret" not in refused.error + " ".join(refused.log)


def test_dg_lists_an_inline_connection_without_its_password(tmp_path: Path) -> None:
    package = project(tmp_path, yaml(database="d", connection=INLINE | {"password": "{{ env.OLD_EXPORT_PASSWORD }}"}))
    (package / "defs" / "resources.py").write_text(
        "import dagster as dg\n\nfrom pg_exports import ClickHouseResource\n\n"
        "defs = dg.Definitions(resources={'clickhouse': ClickHouseResource(host='unused')})\n"
    )
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write(f'[project]\nname = "{package.name}"\nversion = "0"\n')
    environment = os.environ | {"OLD_EXPORT_PASSWORD": SECRET, "PYTHONPATH": str(tmp_path)}
    dg_command = Path(sys.executable).with_name("dg")
    listed = subprocess.run(
        [dg_command, "list", "defs", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    assert '"events"' in listed.stdout
    assert "s3cret" not in listed.stdout + listed.stderr


# Further connections


def test_a_second_connection_is_another_pair_of_resources(source: Source, target: Target, hour: datetime) -> None:
    insert_event(source, hour)
    export = python(team_id=TEAM, start=hour, schema=target.schema, connection="postgres_eu")
    eu = target.resource()
    mine = dg.Definitions(
        resources=resources()
        | {
            "clickhouse": source.resource(),
            "postgres_eu": eu,
            "postgres_eu_io_manager": PostgresIOManager(postgres=eu),
        }
    )
    job = dg.Definitions.merge(export.build_defs(None), mine).resolve_implicit_global_asset_job_def()
    assert job.execute_in_process(partition_key=partition_key(hour)).success
    assert target.count("events") == 1


# Runs


def test_a_range_in_one_run_has_counts_for_each_partition(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_event(source, hour, 2)
    insert_event(source, hour + HOUR, 3)
    export = python(team_id=TEAM, start=hour, schema=target.schema)
    done = run(export, partition_key(hour), partition_key(hour + HOUR))
    assert {key: values["rows_inserted"] for key, values in done.metadata.items()} == {
        partition_key(hour): 2,
        partition_key(hour + HOUR): 3,
    }
    assert {key: values["dagster/partition_row_count"] for key, values in done.metadata.items()} == {
        partition_key(hour): 2,
        partition_key(hour + HOUR): 3,
    }
    assert done.metadata[partition_key(hour)]["interval_start"] == hour.timestamp()
    assert "SET param_team_id = 1;" in done.metadata[partition_key(hour)]["query"]


def test_exports_of_every_model_run_side_by_side(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    for model in ("persons", "sessions"):
        export = python(model=model, team_id=TEAM, start=hour, schema=target.schema)
        assert run(export, partition_key(hour)).counts == (0, 0, 0)
        assert target.count(model) == 0


# The deployment's connections, from the environment


@contextmanager
def environment(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        yield


def test_the_environments_connections_export(
    sandbox: Sandbox, source: Source, target: Target, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_event(source, hour)
    with environment(monkeypatch, **(sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database})):
        export = python(team_id=TEAM, start=hour, schema=target.schema)
        definitions = dg.Definitions.merge(export.build_defs(None), connections())
        job = definitions.resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(partition_key=partition_key(hour)).success
        repository = definitions.get_repository_def()
        shown = " ".join(dg.serialize_value(job.get_job_snapshot()) for job in repository.get_all_jobs())
    assert target.count("events") == 1
    assert sandbox.password not in shown
    assert sandbox.source_password not in shown


@pytest.mark.parametrize(
    "name",
    [
        *("POSTGRES_HOST", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DATABASE"),
        *("CLICKHOUSE_HOST", "CLICKHOUSE_USER", "CLICKHOUSE_PASSWORD"),
    ],
)
def test_a_variable_that_a_run_misses_is_named(sandbox: Sandbox, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with environment(monkeypatch, **(sandbox.environment() | {name: None})):
        definitions = dg.Definitions.merge(python().build_defs(None), connections())
        job = definitions.resolve_implicit_global_asset_job_def()
        with pytest.raises(dg.DagsterError) as caught:
            job.execute_in_process(partition_key="2026-11-20-00:00")
    shown = "".join(traceback.format_exception(caught.value))
    assert f"The environment variable {name} is not set. Set it where Dagster runs, or in the .env file" in shown
    assert sandbox.password not in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_PORT", "5432a"),
        ("POSTGRES_PORT", "-1"),
        ("CLICKHOUSE_PORT", "https"),
        ("CLICKHOUSE_SECURE", "maybe"),
        ("POSTGRES_VERIFY_SERVER_IDENTITY", "prefer"),
    ],
)
def test_a_variable_with_a_wrong_value_is_named(
    sandbox: Sandbox, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        environment(monkeypatch, **(sandbox.environment() | {name: value})),
        pytest.raises(SettingsError, match=f"The environment variable {name} must be"),
    ):
        connections()


@pytest.mark.parametrize("value", ["", "0", "no", "FALSE"])
def test_clickhouse_is_reached_over_plain_http_unless_secure_is_set(
    sandbox: Sandbox, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with environment(monkeypatch, **(sandbox.environment() | {"CLICKHOUSE_SECURE": value})):
        clickhouse = (connections().resources or {})["clickhouse"]
    assert isinstance(clickhouse, ClickHouseResource)
    assert not clickhouse.secure


def test_the_shipped_exports_load_and_a_missing_team_is_named(
    sandbox: Sandbox, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with environment(monkeypatch, **sandbox.environment()):
        definitions = dg.load_from_defs_folder(path_within_project=repository / "pg_exports")
        dg.Definitions.validate_loadable(definitions)
        assert {"events", "persons", "sessions"} <= set(assets(definitions))
    with environment(monkeypatch, PG_EXPORTS_TEAM_ID=None), pytest.raises(Exception, match=r"defs\.yaml") as caught:
        dg.load_from_defs_folder(path_within_project=repository / "pg_exports")
    assert "PG_EXPORTS_TEAM_ID is not set" in str(caught.value.__cause__)


def test_an_export_is_materialised_into_a_table_of_another_name(source: Source, target: Target, hour: datetime) -> None:
    insert_event(source, hour)
    export = python(team_id=TEAM, start=hour, schema=target.schema, name="copy", table='it\'s "my" table')
    assert materialise(export, source.resource(), target.resource(), partition_key(hour)).counts == (1, 0, 0)
    assert target.count('it\'s "my" table') == 1
