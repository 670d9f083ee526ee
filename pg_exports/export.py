"""PostgresExport: one export's settings, and the asset, job and schedule that they become.

What is exported is `models/`'s business, when is `partitions`'; how rows are read and written is further down.
"""

import functools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, Self, cast

import dagster as dg
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from pg_exports import late_events, reconciliation
from pg_exports.clickhouse import ClickHouseResource
from pg_exports.errors import SettingsError
from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Deduplicate, Interval, IntervalFrames, OnBadRows
from pg_exports.models import MODELS, Model, Query, Selection
from pg_exports.models.model import moment
from pg_exports.partitions import Grid, IntervalLength, intervals, recent, unsettled
from pg_exports.postgres import PostgresIOManager, PostgresResource
from pg_exports.postgres import io_manager as io
from pg_exports.postgres.table import Destination
from pg_exports.postgres.tls import SYSTEM, VerifyServerIdentity

OWNER = "team:pg_exports"

_VARIABLE = re.compile(r"\{\{\s*env\.(\w+)\s*\}\}")


def _as_written(context: dg.ResolutionContext, value: Any) -> Any:
    """A YAML value with its templates filled in; reading it is the field's own business."""
    return context.resolve_value(value)


class RunConfig(dg.Config):
    """What a run of an export can be told.

    Attributes:
        replay: ask the table itself which of the intervals' rows it lacks, and send those. For rows that were deleted by
            hand: what earlier runs recorded does not know of it. (Merged models are always compared with the table.)
    """

    replay: bool = False


class InlineConnection(dg.Resolvable, BaseModel):
    """A Postgres server that one export alone writes to; its fields are those of `PostgresResource`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    host: str
    port: int = 5432
    user: str
    password: Annotated[SecretStr, dg.Resolver(_as_written, model_field_type=str)] = SecretStr("")
    verify_server_identity: VerifyServerIdentity = "ca-and-hostname"
    root_certificate: str = Field(default=SYSTEM, repr=False)

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
        )


class _RefusingWithoutValues(BaseModel):
    """The attributes of a YAML file. Dagster prints what it refuses, and a password may be among it."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, written: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(written)
        except ValidationError as error:
            # No ValueError: pydantic would put the values beside it.
            raise SettingsError(
                f"{_who(written if isinstance(written, Mapping) else {})}: {_sentence(error)}"
            ) from None


class PostgresExport(dg.Component, dg.Model, dg.Resolvable):
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

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    exported_model: Literal["events", "persons", "sessions"] = Field(
        alias="model", description="What to export: events, persons or sessions."
    )
    team_id: int = Field(description="ClickHouse team whose rows are exported.")
    start: Annotated[str | date | datetime, dg.Resolver(_as_written, model_field_type=str | float)] = Field(
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
    include_events: list[str] = Field(default=[], description="Events to export, by name; empty = all.")
    exclude_events: list[str] = Field(default=[], description="Events to leave out, by name.")
    database: str | None = Field(
        default=None,
        description="Destination database; the connection's by default, required with an inline connection.",
    )
    destination_schema: str = Field(default="public", alias="schema", description="Destination schema. It must exist.")
    table: str | None = Field(default=None, description="Destination table; the model's name by default.")
    connection: Annotated[
        str | InlineConnection,
        dg.Resolver(
            _as_written,
            model_field_type=str | dict,
            description="Resource key of a connection, or host, port, user, password, verify_server_identity and "
            "root_certificate of one that only this export uses.",
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
        "whole table (table).",
    )
    paused: bool = Field(default=False, description="The schedule starts stopped.")

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> "PostgresExport":
        """The export that a YAML file describes.

        Raises:
            SettingsError: an attribute is missing or wrong, or an environment variable is not set; with the export's
                name. No value is shown, as it may be a secret.
        """
        written = model.model_dump(by_alias=True, exclude_unset=True)
        who = _who(written)
        missing = sorted(set(_VARIABLE.findall(json.dumps(written, default=str))) - set(os.environ))
        if missing:
            raise SettingsError(
                f"{who}: the environment variable {', '.join(missing)} is not set. Set it where Dagster runs (or in the "
                ".env file of the project), or write the value into the export's YAML."
            )
        try:
            return cast("PostgresExport", super().resolve_from_model(context, model))
        except ValidationError as error:
            raise SettingsError(f"{who}: {_sentence(error)}") from None
        except SettingsError as error:
            raise SettingsError(f"{who}: {error}") from None

    @classmethod
    @functools.cache
    def get_model_cls(cls) -> type[BaseModel]:
        """The attributes as a YAML file has them."""
        return create_model("PostgresExportModel", __base__=(_RefusingWithoutValues, cls.model()))

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
        if not isinstance(value, Mapping):
            return value
        try:
            return InlineConnection(**value)
        except ValidationError as error:
            # As text: a nested pydantic error would print the password beside the field at fault.
            raise ValueError(_sentence(error)) from None

    @model_validator(mode="after")
    def _check(self) -> "PostgresExport":
        # Bounds stand here and not in the fields: there they would meet the templates of a YAML file.
        if not 0 < self.team_id < 2**63:
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
        if self.exported_model != "events" and self.deduplicate != "interval":
            raise ValueError("`deduplicate: table` is for `model: events`; persons and sessions are merged")
        if isinstance(self.connection, InlineConnection) and self.database is None:
            raise ValueError("`database` is required with an inline `connection`")
        return self

    @property
    def key(self) -> str:
        """The asset's key."""
        return self.exported_model if self.name is None else self.name

    @property
    def destination(self) -> Destination:
        """Where the rows go.

        Raises:
            SettingsError: a name is empty or too long for Postgres.
        """
        table = self.exported_model if self.table is None else self.table
        return Destination(self.database, self.destination_schema, table)

    def build_defs(self, context: dg.ComponentLoadContext | None) -> dg.Definitions:
        """The export's asset, job and schedule, and for events the sensor that finds late ones.

        The context is not used: None will do.

        Raises:
            SettingsError: the settings contradict each other; with the export's name.
        """
        try:
            asset = self._asset()
        except SettingsError as error:
            raise SettingsError(f"Export {self.key}: {error}") from None
        job = dg.define_asset_job(f"{self.key}_job", selection=[asset], description=f"Exports {self.key}.")
        model = MODELS[self.exported_model]
        sensors = [self._late_events_sensor(model, asset, job)] if model.fingerprints else []
        return dg.Definitions(assets=[asset], jobs=[job], schedules=[self._schedule(asset, job)], sensors=sensors)

    def _asset(self) -> dg.AssetsDefinition:
        model = MODELS[self.exported_model]
        partitions = self._grid().partitions(self.start)

        def export(context: dg.AssetExecutionContext, config: RunConfig, clickhouse: ClickHouseResource) -> Any:
            if not (context.has_partition_key or context.has_partition_key_range):
                raise SettingsError(
                    f"Export {self.key} is partitioned, and this run names no partition. Give it one: "
                    "`dg launch --partition` or `--partition-range`, or choose it in the UI."
                )
            keys = context.partition_key_range
            asked = intervals(partitions, keys.start, keys.end, datetime.now(UTC))
            wait = unsettled(asked, datetime.now(UTC)).total_seconds()
            if wait > 0:
                context.log.info(f"Waiting {wait:.0f} s: {asked[-1]} ended less than a minute ago.")
                time.sleep(wait)
            frames = self._frames(context, clickhouse, model, asked, replay=config.replay)
            yield dg.Output(frames)
            yield reconciliation.result(frames.written)

        with warnings.catch_warnings():
            # Dagster calls backfill policies and an asset's own IO manager beta; a user can do nothing about it.
            warnings.simplefilter("ignore", dg.BetaWarning)
            asset: dg.AssetsDefinition = dg.asset(
                name=self.key,
                description=f"{model.description} Team {self.team_id}, into {self.destination.qualified}.",
                group_name="pg_exports",
                kinds={"clickhouse", "polars", "postgres"},
                owners=[OWNER],
                partitions_def=partitions,
                backfill_policy=dg.BackfillPolicy.single_run(),
                pool=self._connection_key(),
                check_specs=[reconciliation.spec(self.key)],
                metadata=self._metadata(model),
                **self._io_manager(),
            )(export)
        return asset

    def _frames(
        self,
        context: dg.AssetExecutionContext,
        clickhouse: ClickHouseResource,
        model: Model,
        asked: tuple[Interval, ...],
        *,
        replay: bool,
    ) -> IntervalFrames:
        def comment(some: Sequence[Interval] = ()) -> str:
            keys = dict.fromkeys(interval.partition_key for interval in (*some[:1], *some[-1:]))
            named = {"partition": "...".join(keys)} if keys else {}
            return json.dumps({"run_id": context.run_id, "export": self.key, **named})

        # Asked for when the first interval is read: a failure is the IO manager's then, who knows what is written already.
        @functools.cache
        def query_of() -> Callable[[Selection], Query]:
            needed, without = model.dictionary, model.query_without_dictionary
            if not (needed and without) or clickhouse.has_dictionary(needed, log_comment=comment()):
                return model.query
            context.log.warning(
                f"The dictionary {needed} is not in ClickHouse's database {clickhouse.database}, or not to be seen by this "
                "user: the columns that need it are NULL."
            )
            return without

        def read(some: Sequence[Interval], columns: Collection[str]) -> AbstractContextManager[Any]:
            query = query_of()(self._selection(some))
            return clickhouse.frames(query, model, columns=columns, log_comment=comment(some))

        def fingerprints(some: Sequence[Interval]) -> list[Fingerprint]:
            found = self._fingerprints(clickhouse, model, some, comment(some))
            return [found.get(interval.start, Fingerprint()) for interval in some]

        return IntervalFrames(
            export=self.key,
            model=model,
            team_id=self.team_id,
            intervals=asked,
            read=read,
            fingerprints=fingerprints if model.fingerprints else None,
            sql=lambda interval: query_of()(self._selection([interval])).for_console(),
            on_bad_rows=self.on_bad_rows,
            deduplicate=self.deduplicate,
            replay=replay,
        )

    def _fingerprints(
        self, clickhouse: ClickHouseResource, model: Model, span: Sequence[Interval], log_comment: str
    ) -> dict[datetime, Fingerprint]:
        """The fingerprints of intervals that follow each other, by their starts; of those that have rows."""
        assert model.fingerprints
        return {
            moment(start): Fingerprint(rows, xor, total)
            for start, rows, xor, total in clickhouse.rows(
                model.fingerprints(self._selection(span)), log_comment=log_comment
            )
        }

    def _selection(self, span: Sequence[Interval]) -> Selection:
        """The rows of intervals that follow each other."""
        return Selection(
            self.team_id,
            span[0].start,
            span[-1].end,
            tuple(self.include_events),
            tuple(self.exclude_events),
            tuple(interval.start for interval in span),
        )

    def _schedule(self, asset: dg.AssetsDefinition, job: Any) -> dg.ScheduleDefinition:
        partitions = asset.partitions_def
        assert partitions is not None

        @dg.schedule(
            name=f"{self.key}_schedule",
            job=job,
            cron_schedule=self._grid().schedule,
            execution_timezone=self.timezone,
            default_status=dg.DefaultScheduleStatus.STOPPED if self.paused else dg.DefaultScheduleStatus.RUNNING,
            description=f"Exports {self.key} one minute after each interval's end.",
        )
        def newest_interval(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
            with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
                key = partitions.get_last_partition_key()
            if key is None:
                return dg.SkipReason(f"No interval is over yet: the first one begins at `start` {self.start}.")
            return dg.RunRequest(partition_key=key)

        return newest_interval

    def _late_events_sensor(self, model: Model, asset: dg.AssetsDefinition, job: Any) -> dg.SensorDefinition:
        partitions = cast("dg.TimeWindowPartitionsDefinition", asset.partitions_def)
        io_manager = self._io_manager().get("io_manager_key")

        @dg.sensor(
            name=f"{self.key}_late_events",
            job=job,
            minimum_interval_seconds=late_events.SECONDS_BETWEEN[self.interval],
            default_status=dg.DefaultSensorStatus.STOPPED if self.paused else dg.DefaultSensorStatus.RUNNING,
            required_resource_keys={"clickhouse", *([io_manager] if io_manager else [])},
            description=f"Exports the intervals of {self.key} again that gained events after they had run.",
        )
        def find_late_events(context: dg.SensorEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
            now = datetime.now(UTC)
            latest = recent(partitions, late_events.INTERVALS, now)
            if not latest:
                return dg.SkipReason("No interval is over yet.")
            postgres = (
                getattr(context.resources, io_manager).postgres
                if io_manager
                else cast("InlineConnection", self.connection).resource(self.database or "")
            )
            span = Interval("", latest[0].start, latest[-1].end)
            exported = late_events.exported(postgres, self.destination, model, self.key, self.team_id, span)
            if not exported:
                return late_events.requests(self.key, latest, exported, {}, now)
            comment = json.dumps({"sensor": context.sensor_name, "export": self.key})
            at_source = self._fingerprints(context.resources.clickhouse, model, latest, comment)
            return late_events.requests(self.key, latest, exported, at_source, now)

        return find_late_events

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
        names = (destination.database, destination.schema, destination.table)
        columns = [
            dg.TableColumn(column.name, type=column.postgres_type) for column in model.columns if not column.optional
        ]
        return {
            "dagster/table_name": ".".join(name for name in names if name),
            "dagster/column_schema": dg.TableSchema(columns=columns),
            io.MODEL: model.name,
            io.TEAM_ID: self.team_id,
            io.SCHEMA: destination.schema,
            io.TABLE: destination.table,
            **({io.DATABASE: destination.database} if destination.database else {}),
        }


def _who(written: Mapping[str, Any]) -> str:
    name = written.get("name") or written.get("model")
    return f"Export {name}" if name else "An export"


def _sentence(error: ValidationError) -> str:
    """A pydantic error in one line, without the values, which may be secrets. Of an attribute's problems the first."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        # What follows an attribute's name may be a type of pydantic's own, one for each that was tried.
        attribute = f"`{problem['loc'][0]}`: " if problem["loc"] else ""
        problems.setdefault(attribute, _said(problem["msg"]))
    return "; ".join(f"{attribute}{message}" for attribute, message in problems.items())


def _said(message: str) -> str:
    """A message without what pydantic puts before a validator's own words, and in a user's words."""
    return message.removeprefix("Value error, ").replace("Extra inputs are not permitted", "there is no such attribute")
