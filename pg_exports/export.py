"""PostgresExport: one export's settings, and the asset, jobs, schedule and sensor that they become.

What is exported is `models/`'s business, when is `partitions`'; how rows are read and written is further down.
"""

import re
import warnings
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, Self, cast
from weakref import WeakKeyDictionary

import dagster as dg
from dagster.components.core.defs_module import ComponentPath
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from pg_exports import checks, connection_check, late_rows, lineage, verification
from pg_exports.checks import volume
from pg_exports.clickhouse import ClickHouseResource
from pg_exports.component import SettingsComponent, as_written, read_part
from pg_exports.connection_check import Setup
from pg_exports.errors import SettingsError
from pg_exports.interval import Deduplicate, IntervalFrames, OnBadRows
from pg_exports.late_rows import Cursor, Watch
from pg_exports.models import (
    MERGED_EVENTS,
    MODELS,
    AddedColumn,
    Model,
    OwnModel,
    PropertyFilter,
    Selection,
    with_columns,
)
from pg_exports.partitions import Grid, IntervalLength, intervals, recent
from pg_exports.postgres import PostgresIOManager, PostgresResource
from pg_exports.postgres import io_manager as io
from pg_exports.postgres.login import Authentication
from pg_exports.postgres.table import Destination
from pg_exports.postgres.tls import SYSTEM, VerifyServerIdentity
from pg_exports.reader import Reader
from pg_exports.scaffold import ExportScaffolder
from pg_exports.schedule import backfill_policy, freshness, schedule
from pg_exports.verification import Subject

OWNER = "team:pg_exports"

MAX_PARTITIONS_PER_RUN = 720
"""Intervals of a backfill's run where an export does not say."""

MAX_LATE_ROWS_DAYS = 60
"""Most days for which late rows are looked for."""

MAX_STREAMS = 16
"""Most connections of one export."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# What a run can be told. A plain truth value: in a `dg.Config` a launch could say `{env: NAME}`.
_RUN_CONFIG = {
    "replay": dg.Field(
        bool,
        default_value=False,
        description="Ask the table itself which of the intervals' rows it lacks, and send those. For rows that were deleted "
        "by hand: what earlier runs recorded does not know of it. (Merged models are always compared with the table.)",
    )
}


class InlineConnection(dg.Resolvable, BaseModel):
    """A Postgres server that one export alone writes to.

    Attributes:
        host: name or address.
        port: 5432 unless another is given.
        user: whom to connect as.
        password: as `{{ env.NAME }}`, never the password itself.
        verify_server_identity: `no`, `ca` or `ca-and-hostname`; all three encrypt.
        root_certificate: `system`, a path to a certificate, or PEM text.
        authentication: what the server may ask for at login, `scram-sha-256` unless another is given.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    host: str
    port: int = 5432
    user: str
    password: Annotated[SecretStr, dg.Resolver(as_written, model_field_type=str)] = SecretStr("")
    verify_server_identity: VerifyServerIdentity = "ca-and-hostname"
    root_certificate: str = Field(default=SYSTEM, repr=False)
    authentication: Authentication = "scram-sha-256"

    def resource(self, database: str) -> PostgresResource:
        """The connection as a resource, to one database."""
        return PostgresResource(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password.get_secret_value(),
            database=database,
            verify_server_identity=self.verify_server_identity,
            root_certificate=self.root_certificate,
            authentication=self.authentication,
        )


# Where the exports of a project are, by their names. A load of the project keeps its state in one object.
_PLACES: WeakKeyDictionary[object, dict[str, ComponentPath]] = WeakKeyDictionary()


@dg.scaffold_with(ExportScaffolder)
class PostgresExport(SettingsComponent):
    """One model sent to one Postgres table on one interval.

    In YAML:

        type: pg_exports.PostgresExport
        attributes:
          model: events
          team_id: 1
          start: 2026-11-20

    In Python: `PostgresExport(model="events", team_id=1, start="2026-11-20").build_defs(None)`.

    Its asset needs the resources `clickhouse` and `<connection>_io_manager`.
    """

    exported_model: Annotated[
        Literal["events", "persons", "sessions"] | OwnModel,
        dg.Resolver(
            as_written,
            model_field_type=str | dict,
            description="What to export: events, persons or sessions; or a model of your own, with name, query, columns, key "
            "and version.",
        ),
    ] = Field(alias="model")
    team_id: int | None = Field(
        default=None, description="ClickHouse team whose rows are exported; required but for a model of your own."
    )
    start: Annotated[str | date | datetime, dg.Resolver(as_written, model_field_type=str | float)] = Field(
        description="Beginning of the first interval: an ISO date (the period that begins on that date, at offset_hour) "
        "or datetime (read in timezone, or converted to it when it carries an offset)."
    )
    name: str | None = Field(
        default=None,
        description="The asset's key; the model's name by default. A second export of one model needs its own.",
    )
    interval: IntervalLength = Field(
        default="hour", description="Length of an interval: hour, day, week, every 5 minutes or every 15 minutes."
    )
    timezone: str = Field(
        default="UTC", description="IANA timezone in which days and weeks begin, and in which start and keys are read."
    )
    offset_hour: int = Field(default=0, description="Hour at which a day or week begins.")
    offset_day: int = Field(default=0, description="Day on which a week begins, 0 = Sunday.")
    include_events: Annotated[list[str], dg.Resolver(as_written, model_field_type=list[str])] = Field(
        default=[], description="Events to export, by name; empty = all."
    )
    exclude_events: Annotated[list[str], dg.Resolver(as_written, model_field_type=list[str])] = Field(
        default=[], description="Events to leave out, by name."
    )
    filters: Annotated[
        list[PropertyFilter],
        dg.Resolver(
            as_written,
            model_field_type=list[dict] | str,
            description="Conditions on properties of the event or the person, all of which must hold: key, operator, value "
            "and type each. For events and persons.",
        ),
    ] = Field(default=[])
    columns: Annotated[
        dict[str, bool | str | AddedColumn],
        dg.Resolver(
            as_written,
            model_field_type=dict | str,
            description="Changes of the model's columns, by name: false leaves one out, true creates an optional one with the "
            "table, a text renames it, and an expression with a type adds one.",
        ),
    ] = Field(default={})
    database: str | None = Field(
        default=None,
        description="Destination database; the connection's by default, required with an inline connection.",
    )
    destination_schema: str = Field(
        default="public",
        alias="schema",
        description="Destination schema. It must exist; better than `public` is one in which nobody else may create.",
    )
    table: str | None = Field(default=None, description="Destination table; the model's name by default.")
    connection: Annotated[
        str | InlineConnection,
        dg.Resolver(
            as_written,
            model_field_type=str | dict,
            description="Resource key of a connection, or host, port, user, password, verify_server_identity, "
            "root_certificate and authentication of one that only this export uses.",
        ),
    ] = "postgres"
    on_bad_rows: OnBadRows = Field(
        default="repair",
        description="Rows that Postgres cannot hold: repair (where that is faithful, else set aside), reject (set them all "
        "aside) or fail.",
    )
    deduplicate: Deduplicate = Field(
        default="interval",
        description="An event that ClickHouse received in two intervals lands in each of them (interval), or once in the "
        "whole table: the one that lands first stays until an event of either interval changes (table), or the newest one "
        "replaces it (replace).",
    )
    late_rows_days: float = Field(
        default=late_rows.DAYS,
        description="How many days after its end an interval is looked at for rows that became visible late, and exported "
        "again if there are any.",
    )
    max_partitions_per_run: int = Field(
        default=MAX_PARTITIONS_PER_RUN,
        description="A backfill goes in runs of so many intervals at most: workers share them, and one that fails costs no "
        "other.",
    )
    streams: int = Field(
        default=1,
        description="Connections over which the rows of one interval are read and copied side by side, 1 to 16; as many as "
        "the pool has free. For intervals of millions of rows and a Postgres with cores to spare.",
    )
    paused: bool = Field(default=False, description="The schedule starts stopped.")

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        """The export that a YAML file of a project describes.

        Raises:
            SettingsError: as of `resolve_from_model`, or another file of the project describes an export of this name.
        """
        export = super().load(attributes, context)
        place = context.component_path
        other = _PLACES.setdefault(context.component_tree.state_tracker, {}).setdefault(export.key, place)
        if other != place:
            files = " and ".join(str(path.file_path.relative_to(context.project_root)) for path in (other, place))
            raise SettingsError(
                f"Two exports are called {export.key}, in {files}: give one of them a `name` of its own."
            )
        return export

    @classmethod
    def who(cls, written: Mapping[str, Any]) -> str:
        """See `SettingsComponent`."""
        model = written.get("model")
        name = written.get("name") or (model.get("name") if isinstance(model, Mapping) else model)
        return f"Export {name}" if name else "An export"

    @field_validator("start", mode="before")
    @classmethod
    def _is_no_number(cls, value: Any) -> Any:
        # Pydantic would read one as seconds since 1970.
        if not isinstance(value, (str, date)):
            raise ValueError("must be an ISO date (2026-11-20) or an ISO datetime (2026-11-20T13:00:00+01:00)")
        return value

    @field_validator("connection", mode="before")
    @classmethod
    def _read_inline_connection(cls, value: Any) -> Any:
        return read_part(InlineConnection, value)

    @field_validator("exported_model", mode="before")
    @classmethod
    def _read_own_model(cls, value: Any) -> Any:
        return read_part(OwnModel, value)

    @field_validator("filters", mode="before")
    @classmethod
    def _read_filters(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [read_part(PropertyFilter, each, f"number {number}: ") for number, each in enumerate(value, start=1)]

    @field_validator("columns", mode="before")
    @classmethod
    def _read_columns(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for name, change in value.items():
            if not isinstance(change, (bool, str, Mapping, AddedColumn)):
                raise ValueError(f"{name}: must be false, true, a name, or an expression with its type")
        return {name: read_part(AddedColumn, change, f"{name}: ") for name, change in value.items()}

    @model_validator(mode="after")
    def _check(self) -> "PostgresExport":
        # Bounds stand here and not in the fields: there they would meet the templates of a YAML file.
        if isinstance(self.exported_model, OwnModel) and self.exported_model.name in MODELS:
            raise ValueError(f"`model`: `name` must be another one than {', '.join(MODELS)}")
        if self.team_id is None and isinstance(self.exported_model, str):
            raise ValueError("`team_id`: Field required")
        if self.team_id is not None and not 0 < self.team_id < 2**63:
            raise ValueError("`team_id` must be a team's number, 1 or greater")
        if not re.fullmatch("[A-Za-z0-9_]+", self.key):
            raise ValueError("`name` must be letters, digits and underscores")
        if isinstance(self.connection, str) and not re.fullmatch("[A-Za-z0-9_]+", self.connection):
            raise ValueError("`connection` must be a resource key (letters, digits and underscores) or a connection")
        if not 0 <= self.offset_hour <= 23 or not 0 <= self.offset_day <= 6:
            raise ValueError("`offset_hour` must be 0 to 23, `offset_day` 0 (Sunday) to 6")
        if self.interval != "week" and self.offset_day:
            raise ValueError("`offset_day` is for `interval: week`")
        if self.interval not in ("day", "week") and self.offset_hour:
            raise ValueError("`offset_hour` is for `interval: day` and `interval: week`")
        if self.exported_model != "events" and (self.include_events or self.exclude_events):
            raise ValueError("`include_events` and `exclude_events` are for `model: events`")
        try:
            model = self.model_with_columns
        except ValueError as error:
            raise ValueError(f"`columns`: {error}") from None
        try:
            model.check_filters(self.filters)
        except ValueError as error:
            raise ValueError(f"`filters`: {error}") from None
        if self.deduplicate != "interval" and (
            model.merge if self.deduplicate == "table" else self.exported_model != "events"
        ):
            raise ValueError(
                f"`deduplicate: {self.deduplicate}` is for `model: events`; merged rows are in the table once"
            )
        if not 0 < self.late_rows_days <= MAX_LATE_ROWS_DAYS:
            raise ValueError(f"`late_rows_days` must be more than 0 and at most {MAX_LATE_ROWS_DAYS}")
        if self.max_partitions_per_run < 1:
            raise ValueError("`max_partitions_per_run` must be 1 or more")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"`streams` must be 1 to {MAX_STREAMS}")
        if self.streams > 1 and self.deduplicate == "table":
            raise ValueError(
                "`streams` are for `deduplicate: interval`: an event may be in several intervals otherwise"
            )
        if isinstance(self.connection, InlineConnection) and self.database is None:
            raise ValueError("`database` is required with an inline `connection`")
        return self

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self.exported_model if isinstance(self.exported_model, str) else self.exported_model.name

    @property
    def model_with_columns(self) -> Model:
        """The model with the export's changes of its columns.

        Raises:
            ValueError: a change that the model cannot have.
        """
        own = self.exported_model
        model = MODELS[own] if isinstance(own, str) else own.as_model()
        if self.deduplicate == "replace" and own == "events":
            model = MERGED_EVENTS
        return with_columns(model, self.columns)

    @property
    def key(self) -> str:
        """The asset's key."""
        return self.model_name if self.name is None else self.name

    @property
    def destination(self) -> Destination:
        """Where the rows go.

        Raises:
            SettingsError: a name is empty or too long for Postgres.
        """
        table = self.model_name if self.table is None else self.table
        return Destination(self.database, self.destination_schema, table)

    def build_defs(self, context: dg.ComponentLoadContext | None) -> dg.Definitions:
        """The export's asset with its checks, its job and schedule, the jobs that check its set-up and compare what
        has landed, and the sensor that finds late rows.

        The context is not used: None will do.

        Raises:
            SettingsError: the settings contradict each other; with the export's name.
        """
        try:
            partitions = self._grid().partitions(self.start)
            asset = self._asset(partitions)
            check = connection_check.job(
                Setup(self.key, self.model_with_columns, self._selection, self.destination),
                f"{self.connection}_io_manager"
                if isinstance(self.connection, str)
                else self.connection.resource(self.database or ""),
            )
        except SettingsError as error:
            raise SettingsError(f"Export {self.key}: {error}") from None
        job = dg.define_asset_job(f"{self.key}_job", selection=[asset], description=f"Exports {self.key}.")
        when = schedule(self.key, job, self._grid(), partitions, self.start, paused=self.paused)
        sensor = self._late_rows_sensor(partitions, job)
        return dg.Definitions(
            assets=[asset], jobs=[job, check, self._verification(partitions)], schedules=[when], sensors=[sensor]
        )

    def _asset(self, partitions: dg.TimeWindowPartitionsDefinition) -> dg.AssetsDefinition:
        model = self.model_with_columns

        def export(context: dg.AssetExecutionContext, clickhouse: ClickHouseResource) -> Any:
            if not (context.has_partition_key or context.has_partition_key_range):
                raise SettingsError(
                    f"Export {self.key} is partitioned, and this run names no partition. Give it one: "
                    "`dg launch --partition` or `--partition-range`, or choose it in the UI."
                )
            keys = context.partition_key_range
            asked = intervals(partitions, keys.start, keys.end, datetime.now(UTC))
            frames = IntervalFrames(
                export=self.key,
                model=model,
                team_id=self.team_id or 0,
                intervals=asked,
                source=self.source(clickhouse, {"run_id": context.run_id}, context.log),
                on_bad_rows=self.on_bad_rows,
                deduplicate=self.deduplicate,
                streams=self.streams,
                history=volume.history(asked[0]),
                replay=context.op_execution_context.op_config["replay"],
            )
            yield dg.Output(frames)
            yield from checks.results(frames, partitions)

        with warnings.catch_warnings():
            # Dagster calls backfill policies and an asset's own IO manager beta; a user can do nothing about it.
            warnings.simplefilter("ignore", dg.BetaWarning)
            asset: dg.AssetsDefinition = dg.asset(
                name=self.key,
                description=self._description(model),
                group_name="pg_exports",
                kinds={"clickhouse", "polars", "postgres"},
                owners=[OWNER],
                deps=[lineage.source(table) for table in model.source_tables],
                partitions_def=partitions,
                backfill_policy=backfill_policy(self.max_partitions_per_run),
                freshness_policy=None if self.paused else freshness(self.interval),
                pool=self._connection_key(),
                check_specs=checks.specs(self.key),
                metadata=self._metadata(model),
                config_schema=_RUN_CONFIG,
                **self._io_manager(),
            )(export)
        return asset

    def _description(self, model: Model) -> str:
        team = f" Team {self.team_id}," if self.team_id else ""
        return f"{model.description}{team} into {self.destination.qualified}."

    def source(self, clickhouse: ClickHouseResource, about: dict[str, str], log: Any) -> Reader:
        """Where the rows are; `about` is what each query carries as a comment, beside the export's name."""
        return Reader(clickhouse, self.model_with_columns, self._selection, {**about, "export": self.key}, log)

    @property
    def _selection(self) -> Selection:
        """Which rows are exported, of whatever interval."""
        return Selection(
            team_id=self.team_id or 0,
            start=EPOCH,
            end=EPOCH,
            include_events=tuple(self.include_events),
            exclude_events=tuple(self.exclude_events),
            filters=tuple(self.filters),
        )

    def _late_rows_sensor(self, partitions: dg.TimeWindowPartitionsDefinition, job: Any) -> dg.SensorDefinition:
        model = self.model_with_columns
        io_manager = self._io_manager().get("io_manager_key")
        seconds = late_rows.SECONDS_BETWEEN[self.interval]

        @dg.sensor(
            name=f"{self.key}_late_rows",
            job=job,
            minimum_interval_seconds=seconds,
            default_status=dg.DefaultSensorStatus.STOPPED if self.paused else dg.DefaultSensorStatus.RUNNING,
            required_resource_keys={"clickhouse", *([io_manager] if io_manager else [])},
            description=f"Exports the intervals of {self.key} again that gained rows after they had run.",
        )
        def find_late_rows(context: dg.SensorEvaluationContext) -> dg.SensorResult:
            now = datetime.now(UTC)
            latest = recent(partitions, late_rows.AT_LEAST, now, now - timedelta(days=self.late_rows_days))
            if not latest:
                return dg.SensorResult(skip_reason="No interval is over yet.")
            repository = context.repository_def
            exports = repository.asset_graph.get_all_asset_keys() if repository else set()
            watch = Watch(
                export=self.key,
                exports=frozenset(key.to_user_string() for key in exports),
                model=model,
                team_id=self.team_id or 0,
                destination=self.destination,
                postgres=self._postgres(context.resources),
                source=self.source(context.resources.clickhouse, {"sensor": context.sensor_name}, context.log),
                between=timedelta(seconds=seconds),
            )
            return watch.tick(latest, Cursor.read(context.cursor), context.instance)

        return find_late_rows

    def _verification(self, partitions: dg.TimeWindowPartitionsDefinition) -> dg.JobDefinition:
        io_manager = self._io_manager().get("io_manager_key")
        subject = Subject(
            self.key,
            self.model_with_columns,
            self.team_id or 0,
            self.destination,
            self.on_bad_rows,
            self.deduplicate,
            partitions,
            self.source,
        )
        return verification.job(
            subject, self._postgres, frozenset({"clickhouse", *([io_manager] if io_manager else [])})
        )

    def _postgres(self, resources: Any) -> PostgresResource:
        """The connection, among the resources that a job or sensor of the export has."""
        if isinstance(self.connection, str):
            return cast("PostgresResource", getattr(resources, f"{self.connection}_io_manager").postgres)
        return self.connection.resource(self.database or "")

    def _grid(self) -> Grid:
        return Grid(self.interval, self.timezone, self.offset_hour, self.offset_day)

    def _connection_key(self) -> str:
        return self.connection if isinstance(self.connection, str) else "postgres"

    def _io_manager(self) -> dict[str, Any]:
        if isinstance(self.connection, str):
            return {"io_manager_key": f"{self.connection}_io_manager"}
        connection = self.connection.resource(self.database or "")
        return {"io_manager_def": PostgresIOManager(postgres=connection)}

    def _metadata(self, model: Model) -> dict[str, Any]:
        destination = self.destination
        created = [column for column in model.columns if not column.optional]
        columns = [dg.TableColumn(column.name, type=column.postgres_type) for column in created]
        inserted_at = next((column.name for column in model.columns if column.name_in_answer == "inserted_at"), None)
        return {
            "dagster/table_name": destination.dotted,
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/column_lineage": lineage.columns(created),
            io.MODEL: model.name,
            io.SCHEMA: destination.schema,
            io.TABLE: destination.table,
            **({io.DATABASE: destination.database} if destination.database else {}),
            **({io.TEAM_ID: self.team_id} if self.team_id else {}),
            **({io.INSERTED_AT: inserted_at} if self.exported_model == "events" and inserted_at else {}),
        }
