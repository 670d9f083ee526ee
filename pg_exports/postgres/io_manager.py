"""The IO manager: writes an export's intervals to its table, each in one transaction, and reads the table back."""

import contextlib
import functools
import itertools
import operator
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
from pydantic import PrivateAttr

from pg_exports import lineage
from pg_exports.at_launch import FixedAtLaunch
from pg_exports.errors import PassingError, SettingsError
from pg_exports.interval import SAMPLE, Counts, Interval, IntervalFrames, spanned
from pg_exports.pool import further_slots
from pg_exports.postgres import ledger, registry, rejected, strangers, writer
from pg_exports.postgres import table as tables
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.merge import SupersededError
from pg_exports.postgres.resource import PostgresResource
from pg_exports.postgres.session import MERGE_TIMEOUT, Session
from pg_exports.postgres.table import Destination, DestinationTable

RETRIES = dg.RetryPolicy(max_retries=5, delay=1, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""After a passing error a run tries again, up to five times in about a minute; after any other one it fails at once."""

SPAN = timedelta(days=31)
"""Most that one transaction covers: it holds a lock for each hour."""

ROWS_TOGETHER = 100_000
"""Rows at the source for which small intervals are read by one query, and written in one transaction."""

GAPS = timedelta(days=90)
"""How far before a run's last interval its check looks for missing ones."""

TRIES_OF_A_MERGE = 20
"""How often an interval is read again at once because other runs merged the same rows while it was read."""

GROWTH = 8
"""How many times more intervals the next transaction may have than the last one."""

Metadata = dict[str, Any]
"""A materialisation's metadata."""

MODEL, TEAM_ID, DATABASE, SCHEMA, TABLE, INSERTED_AT = (
    "pg_exports/model",
    "pg_exports/team_id",
    "pg_exports/database",
    "pg_exports/schema",
    "pg_exports/table",
    "pg_exports/inserted_at",
)
"""Keys of an export's definition metadata: what `load_input` knows of the export whose table it reads."""


class PostgresIOManager(FixedAtLaunch, dg.ConfigurableIOManager):
    """Writes exports to Postgres over one connection's settings.

    An interval's rows and its row in the ledger commit together, or neither does. The table is created where it is
    missing; rows of a model without a merge go straight in on an interval's first load.

    Attributes:
        postgres: the connection.
    """

    postgres: dg.ResourceDependency[PostgresResource]
    # By run and step, over the tries of a step.
    _progress: dict[tuple[str, str], "_Progress"] = PrivateAttr(default_factory=dict)

    def handle_output(self, context: dg.OutputContext, obj: IntervalFrames) -> None:
        """Write every interval of the run, oldest first; the counts become the partition's metadata.

        Raises:
            SettingsError, DestinationError, SourceError, PassingError: with what is wrong and what to do. The intervals
                before the one at fault stay written, and are shown as materialised; of that one nothing is written.
        """
        if not isinstance(obj, IntervalFrames):
            raise SettingsError(
                f"{context.asset_key.to_user_string()} returns {type(obj).__name__}; this IO manager writes what an "
                "export's asset returns. Give the asset another `io_manager_key`."
            )
        progress = self._progress.setdefault((context.run_id, context.step_key), _Progress())
        try:
            self._write(context, obj, progress)
        except BaseException as error:
            if isinstance(error, PassingError):
                _try_again(context, error)
            _show(context, progress.written)
            if isinstance(error, dg.Failure) or not isinstance(error, Exception):
                raise
            # What nobody has foreseen is not over at the next try either.
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error

    def _write(self, context: dg.OutputContext, export: IntervalFrames, progress: "_Progress") -> None:
        destination = destination_of(context.definition_metadata)
        export.source.settle(export.intervals[-1])
        with (
            self.postgres.session(destination.database, context.log) as session,
            self._further_sessions(context, destination, export) as others,
        ):
            with session.transaction():
                table = tables.ensure(session, destination, export.model, key_index=export.deduplicate == "table")
                ledger.ensure(session, destination.schema)
                rejected.ensure(session, destination.schema)
                registry.ensure(session, destination.schema)
                registry.recognise(session, table, export.team_id)
                warnings = strangers.of_table(session, destination.schema, table.oid)
            for warning in warnings:
                context.log.warning(warning)
            todo, together, is_first, superseded = export.intervals, 1, True, 0
            while todo:
                some = _together(todo, together, progress.alone)
                began = time.monotonic()
                try:
                    outcome = writer.write(
                        session, destination, export, some, context.run_id, context.log, others, is_first=is_first
                    )
                except SupersededError as error:
                    superseded += 1
                    if superseded > TRIES_OF_A_MERGE:
                        raise
                    context.log.info(f"{error} {spanned(some)} is read again.")
                    continue
                except Exception as error:
                    if len(some) == 1:
                        raise
                    # So that those before the one at fault are written, and the error is about that one.
                    progress.alone.update(some)
                    if isinstance(error, PassingError):
                        raise
                    continue
                is_first, superseded = False, 0
                self._note(context, export, progress, outcome, time.monotonic() - began, table)
                todo = todo[len(outcome.counts) :]
                together = _next_together(outcome.counts)
            _look_back(session, destination, export)

    @contextlib.contextmanager
    def _further_sessions(
        self, context: dg.OutputContext, destination: Destination, export: IntervalFrames
    ) -> Iterator[list[Session]]:
        """The connections of an export with several streams beside its first one: as many as its pool has slots for."""
        with contextlib.ExitStack() as opened:
            asked = export.streams - 1
            slots = opened.enter_context(further_slots(context, asked))
            if slots < asked:
                context.log.info(
                    f"{export.export} has {slots + 1} of {export.streams} streams: its pool has no more slots."
                )
            yield [opened.enter_context(self.postgres.session(destination.database)) for _ in range(slots)]

    def _note(
        self,
        context: dg.OutputContext,
        export: IntervalFrames,
        progress: "_Progress",
        outcome: writer.Outcome,
        seconds: float,
        table: DestinationTable,
    ) -> None:
        """Say what was written, in the log and for each partition."""
        counts = outcome.counts
        total = functools.reduce(operator.add, counts.values())
        say = context.log.warning if total.rejected or total.missing or total.erased else context.log.info
        say(f"{export.export} {spanned(list(counts))}: {total} in {seconds:.1f} s")
        findings = export.findings
        findings.written.update(counts)
        findings.rejected += outcome.rejected[: SAMPLE - len(findings.rejected)]
        findings.repaired += outcome.repaired
        committed_at = datetime.now(UTC)
        for interval in counts:
            share = (counts[interval].at_source + 1) / (total.at_source + len(counts))
            metadata = {
                **_metadata(export, interval, outcome, seconds, share, committed_at),
                "dagster/table_name": table.destination.dotted,
                # The asset's page shows the latest one; for each interval of a range it would be much to store.
                **(_columns(table) if interval == export.intervals[-1] else {}),
            }
            progress.written[interval] = metadata
            dg.AssetExecutionContext.get().add_asset_metadata(metadata, partition_key=interval.partition_key)

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
        with self.postgres.session(destination.database, context.log) as session, session.transaction():
            return _read(session, destination, context, metadata)


@dataclass
class _Progress:
    """How far a step has come: the intervals that are written, and those that are not to be written with others."""

    written: dict[Interval, Metadata] = field(default_factory=dict)
    alone: set[Interval] = field(default_factory=set)


def _together(todo: Sequence[Interval], count: int, alone: Collection[Interval]) -> Sequence[Interval]:
    """The intervals to write in the next transaction: up to so many, of no more than `SPAN`."""
    if todo[0] in alone:
        return todo[:1]
    last = todo[0].start + SPAN
    return list(itertools.takewhile(lambda interval: interval.end <= last and interval not in alone, todo[:count]))


def _next_together(written: Mapping[Interval, Counts]) -> int:
    """How many intervals to write after these: as many as have `ROWS_TOGETHER`, if they are like them."""
    rows = sum(counts.at_source for counts in written.values())
    return max(1, min(len(written) * GROWTH, ROWS_TOGETHER * len(written) // max(rows, 1)))


def destination_of(metadata: Mapping[str, Any]) -> Destination:
    """The destination in an export's definition metadata."""
    return Destination(metadata.get(DATABASE), metadata[SCHEMA], metadata[TABLE])


def _try_again(context: dg.OutputContext, error: PassingError) -> None:
    """Ask for another try, if one is left. Not by a retry policy: by one Dagster tries a run again that was terminated."""
    step = context.step_context
    tries = step.previous_attempt_count + 1
    if tries <= RETRIES.max_retries and not step.retry_mode.disabled:
        raise dg.RetryRequested(RETRIES.max_retries, RETRIES.calculate_delay(tries)) from error


def _show(context: dg.OutputContext, written: Mapping[Interval, Metadata]) -> None:
    """Show the intervals that a failed run has committed as materialised, which Dagster does after a success only."""
    for interval, metadata in written.items():
        dg.AssetExecutionContext.get().log_event(
            dg.AssetMaterialization(context.asset_key, partition=interval.partition_key, metadata=metadata)
        )


def _look_back(session: Session, destination: Destination, export: IntervalFrames) -> None:
    """Find in the table and its ledger what the run's checks compare with."""
    findings, first, last = export.findings, export.intervals[0], export.intervals[-1]
    with session.transaction():
        table = registry.recognise(session, tables.inspect(session, destination, export.model), export.team_id)
        for column in table.lacking:
            found = findings.lacking_optional if column.optional else findings.lacking
            found[column.name] = table.added(column) or ""
        span = Interval("", first.start - export.history, last.end)
        findings.history = ledger.history(session, table, export.export, export.team_id, span)
        findings.gaps = ledger.gaps(session, table, export.export, export.team_id, last.start - GAPS)


def _columns(table: DestinationTable) -> Metadata:
    """The columns that are written, in the table's types, and where they come from."""
    schema = dg.TableSchema(
        [
            dg.TableColumn(
                column.name, type=column.declared, constraints=dg.TableColumnConstraints(nullable=not column.not_null)
            )
            for _, column in table.pairs
        ]
    )
    return {
        "dagster/column_schema": schema,
        "dagster/column_lineage": lineage.columns(source for source, _ in table.pairs),
    }


def _metadata(
    export: IntervalFrames,
    interval: Interval,
    outcome: writer.Outcome,
    seconds: float,
    share: float,
    committed_at: datetime,
) -> Metadata:
    """What a partition shows: its counts, and its share of its transaction's seconds."""
    counts, spent = outcome.counts[interval], outcome.seconds
    seconds *= share
    first, last = outcome.times.get(interval, (None, None))
    return {
        "dagster/partition_row_count": counts.at_source,
        "rows_at_source": counts.at_source,
        "rows_inserted": counts.inserted,
        "rows_updated": counts.updated,
        "rows_unchanged": counts.unchanged,
        "rows_repaired": counts.repaired,
        "rows_rejected": counts.rejected,
        "rows_erased_at_source": counts.erased,
        "bytes": counts.bytes,
        "seconds": round(seconds, 3),
        "seconds_source": round(spent.source * share, 3),
        "seconds_transform": round(spent.transform * share, 3),
        "seconds_copy": round(spent.copy * share, 3),
        **({"seconds_merge": round(spent.merge * share, 3)} if export.model.merge else {}),
        "rows_per_second": round(counts.at_source / seconds, 1),
        "lag_seconds": round((committed_at - interval.end).total_seconds(), 1),
        "interval_start": dg.MetadataValue.timestamp(interval.start),
        "interval_end": dg.MetadataValue.timestamp(interval.end),
        **({"first_timestamp": dg.MetadataValue.timestamp(first)} if first else {}),
        **({"last_timestamp": dg.MetadataValue.timestamp(last)} if last else {}),
        "query_ids": ", ".join(export.source.query_ids(interval)),
        "query": dg.MetadataValue.md(f"```sql\n{export.source.sql(interval)}```"),
    }


def _read(
    session: Session, destination: Destination, context: dg.InputContext, metadata: Mapping[str, Any]
) -> pl.DataFrame:
    columns = tables.column_types(session, destination)
    conditions: list[str] = []
    parameters: list[object] = []
    if "team_id" in columns and TEAM_ID in metadata:
        parameters.append(int(metadata[TEAM_ID]))
        conditions.append(f"team_id = ${len(parameters)}")
    inserted_at = metadata.get(INSERTED_AT)
    if inserted_at in columns and context.has_asset_partitions:
        window = context.asset_partitions_time_window
        zone = "" if columns[inserted_at] == "timestamptz" else " AT TIME ZONE 'UTC'"
        for operator, bound in ((">=", window.start), ("<", window.end)):
            parameters.append(bound.astimezone(UTC))
            conditions.append(f"{quoted(inserted_at)} {operator} ${len(parameters)}::text::timestamptz{zone}")
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    names = ", ".join(quoted(name) for name in columns)
    answer = session.arrow(
        f"SELECT {names} FROM {destination.qualified}{where}",
        *parameters,
        doing=f"reading {destination.qualified}",
        patience=MERGE_TIMEOUT,
        of_rows=True,
    )
    return pl.DataFrame(pl.from_arrow(_plain(answer)))


def _plain(answer: pa.Table) -> pa.Table:
    """Extension types (JSON, UUID, NUMERIC) as what they are stored as."""
    columns = [
        column.cast(column.type.storage_type) if isinstance(column.type, pa.BaseExtensionType) else column
        for column in answer.columns
    ]
    return pa.table(dict(zip(answer.column_names, columns, strict=True)))
