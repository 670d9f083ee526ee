"""The IO manager: writes an export's intervals to its table, each in one transaction, and reads the table back."""

import functools
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa

from pg_exports.errors import SettingsError
from pg_exports.interval import Interval, IntervalFrames
from pg_exports.postgres import ingest, ledger, merge, rejected
from pg_exports.postgres import table as tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.ledger import Counts
from pg_exports.postgres.resource import PostgresResource
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable

MODEL, TEAM_ID, DATABASE, SCHEMA, TABLE = (
    "pg_exports/model",
    "pg_exports/team_id",
    "pg_exports/database",
    "pg_exports/schema",
    "pg_exports/table",
)
"""Keys of an export's definition metadata: what `load_input` knows of the export whose table it reads."""


class PostgresIOManager(dg.ConfigurableIOManager):
    """Writes exports to Postgres over one connection's settings.

    An interval's rows and its row in the ledger commit together, or neither does. The table is created where it is
    missing; rows of a model without a merge go straight in on an interval's first load.

    Attributes:
        postgres: the connection.
    """

    postgres: dg.ResourceDependency[PostgresResource]

    def handle_output(self, context: dg.OutputContext, obj: IntervalFrames) -> None:
        """Write every interval of the run, oldest first; the counts become the partition's metadata.

        Raises:
            SettingsError, DestinationError, SourceError, PassingError: with what is wrong and what to do. The intervals
                before the one at fault stay written; of that one nothing is.
        """
        if not isinstance(obj, IntervalFrames):
            raise SettingsError(
                f"{context.asset_key.to_user_string()} returns {type(obj).__name__}; this IO manager writes what an "
                "export's asset returns. Give the asset another `io_manager_key`."
            )
        destination = destination_of(context.definition_metadata)
        with self.postgres.session(destination.database, context.log) as session:
            tables.ensure(session, destination, obj.model)
            ledger.ensure(session, destination.schema)
            rejected.ensure(session, destination.schema)
            for interval in obj.intervals:
                table = tables.inspect(session, destination, obj.model)
                started = time.monotonic()
                counts = _write(session, table, obj, interval, context.run_id)
                seconds = time.monotonic() - started
                say = context.log.warning if counts.rejected else context.log.info
                say(f"{obj.export} {interval}: {_sentence(counts)} in {seconds:.1f} s")
                _add_metadata(obj, interval, counts, seconds)

    def load_input(self, context: dg.InputContext) -> pl.DataFrame:
        """The rows of the export's team: of the partition's interval where the table of an append model has
        `inserted_at`, else all of them.

        Raises:
            DestinationError, PassingError: Postgres refused, or does not answer.
        """
        upstream = context.upstream_output
        metadata = upstream.definition_metadata if upstream else {}
        if TABLE not in metadata:
            raise SettingsError(f"{context.asset_key.to_user_string()} is no export; its table is not known here.")
        destination = destination_of(metadata)
        with self.postgres.session(destination.database, context.log) as session:
            return _read(session, destination, context, metadata)


def destination_of(metadata: Mapping[str, Any]) -> Destination:
    """The destination in an export's definition metadata."""
    return Destination(metadata.get(DATABASE), metadata[SCHEMA], metadata[TABLE])


def _write(
    session: Session, table: DestinationTable, export: IntervalFrames, interval: Interval, run_id: str
) -> Counts:
    started_at = datetime.now(UTC)
    with session.transaction():
        ledger.lock(session, table, interval, whole_table=export.deduplicate == "table")
        past = ledger.past(session, table, export.team_id, interval)
        rejected.resolve(session, table, export.export, interval)
        set_aside = functools.partial(rejected.keep, session, table, export.export, interval, run_id)
        copy = functools.partial(
            ingest.copy_frames, session, table, on_bad_rows=export.on_bad_rows, set_aside=set_aside
        )
        with export.read(interval) as frames:
            if export.model.merge or past.may_hold_interval or export.deduplicate == "table":
                with merge.staging_table(session, table) as staging:
                    copied = copy(staging, frames)
                    merged = merge.merge(session, table, staging)
            else:
                copied = copy(table.destination.table, frames)
                merged = merge.Merged(inserted=copied.rows, updated=0)
        counts = Counts(
            at_source=copied.rows + copied.rejected,
            inserted=merged.inserted,
            updated=merged.updated,
            unchanged=copied.rows - merged.inserted - merged.updated,
            repaired=copied.repaired,
            rejected=copied.rejected,
            bytes=copied.bytes,
        )
        ledger.record(
            session,
            table,
            interval,
            counts,
            export=export.export,
            team_id=export.team_id,
            rows_before=past.rows_before,
            run_id=run_id,
            started_at=started_at,
        )
    return counts


def _sentence(counts: Counts) -> str:
    return (
        f"{counts.at_source} rows at the source, {counts.inserted} inserted, {counts.updated} updated, "
        f"{counts.unchanged} unchanged, {counts.repaired} repaired, {counts.rejected} rejected"
    )


def _add_metadata(export: IntervalFrames, interval: Interval, counts: Counts, seconds: float) -> None:
    dg.AssetExecutionContext.get().add_asset_metadata(
        {
            "dagster/partition_row_count": counts.at_source,
            "rows_at_source": counts.at_source,
            "rows_inserted": counts.inserted,
            "rows_updated": counts.updated,
            "rows_unchanged": counts.unchanged,
            "rows_repaired": counts.repaired,
            "rows_rejected": counts.rejected,
            "bytes": counts.bytes,
            "seconds": round(seconds, 3),
            "interval_start": dg.MetadataValue.timestamp(interval.start),
            "interval_end": dg.MetadataValue.timestamp(interval.end),
            "query": dg.MetadataValue.md(f"```sql\n{export.sql(interval)}```"),
        },
        partition_key=interval.partition_key,
    )


def _read(
    session: Session, destination: Destination, context: dg.InputContext, metadata: Mapping[str, Any]
) -> pl.DataFrame:
    columns = tables.column_types(session, destination)
    conditions: list[str] = []
    parameters: list[object] = []
    if "team_id" in columns:
        parameters.append(int(metadata[TEAM_ID]))
        conditions.append(f"team_id = ${len(parameters)}")
    if metadata[MODEL] == "events" and "inserted_at" in columns and context.has_asset_partitions:
        window = context.asset_partitions_time_window
        zone = "" if columns["inserted_at"] == "timestamptz" else " AT TIME ZONE 'UTC'"
        for operator, bound in ((">=", window.start), ("<", window.end)):
            parameters.append(bound.astimezone(UTC))
            conditions.append(f"inserted_at {operator} ${len(parameters)}::text::timestamptz{zone}")
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    names = ", ".join(quoted(name) for name in columns)
    answer = session.arrow(
        f"SELECT {names} FROM {destination.qualified}{where}", *parameters, doing=f"reading {destination.qualified}"
    )
    return pl.DataFrame(pl.from_arrow(_plain(answer)))


def _plain(answer: pa.Table) -> pa.Table:
    """Extension types (JSON, UUID, NUMERIC) as what they are stored as."""
    columns = [
        column.cast(column.type.storage_type) if isinstance(column.type, pa.BaseExtensionType) else column
        for column in answer.columns
    ]
    return pa.table(dict(zip(answer.column_names, columns, strict=True)))
