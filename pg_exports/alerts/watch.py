"""What is wrong with exports, as Dagster's storage has it: runs that failed for good, and intervals that are late.

Whether that is told, and to whom, is `component`'s and `channels`' business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import dagster as dg
from dagster._core.events import JobFailureData
from dagster._core.scheduler.instigation import InstigatorType, ScheduleInstigatorData

from pg_exports.alerts.channels import Alert
from pg_exports.interval import Interval
from pg_exports.partitions import recent
from pg_exports.postgres import io_manager as io

SETTLING = timedelta(seconds=10)
"""How old a failure is when it is looked at. Only after it does Dagster note whether the run is tried again, and a failure
that was stored earlier may be seen later."""

RUNS_AT_ONCE = 200
"""How many failed runs are looked at in one tick."""

LONGEST = 600
"""Characters of an error that an alert has."""

_STEP_ENDS = {
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.STEP_SUCCESS,
    dg.DagsterEventType.STEP_SKIPPED,
}


@dataclass(frozen=True)
class Export:
    """An export of the code location.

    Attributes:
        key: its asset.
        step: its step in runs.
        partitions: its intervals.
    """

    key: dg.AssetKey
    step: str
    partitions: dg.TimeWindowPartitionsDefinition

    @property
    def name(self) -> str:
        """What users call it."""
        return self.key.to_user_string()


@dataclass(frozen=True)
class FailedRun:
    """A run that failed and is not tried again; when it began and ended, in seconds since 1970."""

    run_id: str
    began: float
    ended: float


def exports_of(repository: dg.RepositoryDefinition) -> list[Export]:
    """The exports among a code location's assets."""
    return [
        Export(key, asset.node_def.name, cast("dg.TimeWindowPartitionsDefinition", asset.partitions_def))
        for key, asset in repository.assets_defs_by_key.items()
        if io.MODEL in asset.metadata_by_key.get(key, {})
    ]


def newest_failure(instance: dg.DagsterInstance) -> int:
    """Where failures that are to come will be found: the storage id of the newest one so far."""
    changes = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1)
    return changes.records[0].storage_id if changes.records else 0


def failed_runs(
    context: dg.SensorEvaluationContext, exports: list[Export], after: int, now: datetime
) -> tuple[dict[str, FailedRun], int]:
    """The newest failed run of each export, by its name, of those that no retry follows; and up to where was looked.

    Args:
        context: the sensor's.
        exports: those to look for.
        after: storage id of the last failure that was looked at.
        now: the current time.
    """
    instance = context.instance
    changes = instance.fetch_run_status_changes(
        dg.RunStatusChangeRecordsFilter(
            dg.DagsterEventType.RUN_FAILURE,
            after_storage_id=after,
            before_timestamp=(now - SETTLING).timestamp(),
        ),
        limit=RUNS_AT_ONCE,
        ascending=True,
    ).records
    found: dict[str, FailedRun] = {}
    for change in changes:
        record = instance.get_run_record_by_id(change.run_id)
        if record is None or not _is_here(context, record.dagster_run) or _is_retried(record.dagster_run):
            continue
        for export in _failed(instance, record.dagster_run, exports):
            found[export.name] = FailedRun(change.run_id, record.start_time or change.timestamp, change.timestamp)
    return found, changes[-1].storage_id if changes else after


def failure_alert(instance: dg.DagsterInstance, export: Export, run_id: str, webserver_url: str | None) -> Alert | None:
    """What to say of an export whose run has failed; nothing where the run was deleted."""
    run = instance.get_run_by_id(run_id)
    if run is None:
        return None
    intervals = _intervals(run.tags)
    return Alert(
        title=_shortened(f"Export {export.name} failed" + (f": {intervals}" if intervals else "")),
        text=_shortened(_error(instance, run_id, export.step)),
        link=f"{webserver_url}/runs/{run_id}" if webserver_url else f"Run {run_id}",
    )


def running_schedules(context: dg.SensorEvaluationContext) -> dict[str, float]:
    """The names of this code location's schedules that are running, and since when, in seconds since 1970."""
    # Dagster keeps no state of a schedule that starts stopped, as that of an export that is paused.
    states = context.instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    return {
        state.instigator_name: state.instigator_data.start_timestamp or 0
        for state in states
        if state.is_running
        and isinstance(state.instigator_data, ScheduleInstigatorData)
        and _is_ours(context, state.origin.repository_origin)
    }


def late_interval(
    instance: dg.DagsterInstance, export: Export, lag: timedelta, running: Mapping[str, float], now: datetime
) -> Interval | None:
    """The newest interval that ended longer ago than the lag, where it is not materialised.

    None for an export whose schedule is stopped, and for an interval that ended before the schedule was started: nobody
    has asked for that one.
    """
    started = running.get(f"{export.name}_schedule")
    due = recent(export.partitions, 1, now - lag)
    if started is None or not due or due[0].end.timestamp() <= started:
        return None
    there = dg.AssetRecordsFilter(export.key, asset_partitions=[due[0].partition_key])
    return None if instance.fetch_materializations(there, limit=1).records else due[0]


def lag_alert(export: Export, interval: Interval, now: datetime, webserver_url: str | None) -> Alert:
    """What to say of an export that is late."""
    minutes = (now - interval.end) // timedelta(minutes=1)
    return Alert(
        title=f"Export {export.name} is late: interval {interval.partition_key}",
        text=f"It ended at {interval.end:%Y-%m-%d %H:%M} UTC, {minutes} minutes ago, and is not in Postgres. "
        "Look at its runs: one may be waiting, or still at work, or have failed.",
        link=f"{webserver_url}/assets/{'/'.join(export.key.path)}" if webserver_url else "",
    )


def has_landed(instance: dg.DagsterInstance, export: Export, after: float, before: float) -> bool:
    """Whether an interval of the export was materialised between two moments, in seconds since 1970."""
    between = dg.AssetRecordsFilter(export.key, after_timestamp=after, before_timestamp=before)
    return bool(instance.fetch_materializations(between, limit=1).records)


def _is_here(context: dg.SensorEvaluationContext, run: dg.DagsterRun) -> bool:
    """Whether a run is one of this code location, as far as Dagster knows: of `dg launch` it does not."""
    return run.remote_job_origin is None or _is_ours(context, run.remote_job_origin.repository_origin)


def _is_ours(context: dg.SensorEvaluationContext, origin: Any) -> bool:
    location = context.code_location_origin
    return location is None or (location.location_name, context.repository_name) == (
        origin.code_location_origin.location_name,
        origin.repository_name,
    )


def _is_retried(run: dg.DagsterRun) -> bool:
    return run.tags.get("dagster/will_retry") == "true"


def _failed(instance: dg.DagsterInstance, run: dg.DagsterRun, exports: list[Export]) -> list[Export]:
    """The exports of a failed run whose steps failed, or never came to their end as the run crashed."""
    if run.execution_plan_snapshot_id is None:
        return []
    planned = set(instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id).step_keys_to_execute)
    asked = [export for export in exports if export.step in planned]
    if not asked:
        return []
    ended = {
        event.step_key: event.event_type
        for event in (
            record.event_log_entry.get_dagster_event()
            for record in instance.get_records_for_run(run.run_id, of_type=_STEP_ENDS).records
        )
    }
    return [export for export in asked if ended.get(export.step) in (None, dg.DagsterEventType.STEP_FAILURE)]


def _intervals(tags: Mapping[str, str]) -> str:
    first, last = tags.get("dagster/asset_partition_range_start"), tags.get("dagster/asset_partition_range_end")
    if first and last and first != last:
        return f"intervals {first} to {last}"
    one = tags.get("dagster/partition") or first
    return f"interval {one}" if one else ""


def _error(instance: dg.DagsterInstance, run_id: str, step: str) -> str:
    """Why a step failed, or the run where the step did not come to its end; in the error's own words."""
    ends = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}
    events = [
        record.event_log_entry.get_dagster_event()
        for record in instance.get_records_for_run(run_id, of_type=ends).records
    ]
    for event in events:
        if event.is_step_failure and event.step_key == step:
            failure = event.step_failure_data
            if failure.user_failure_data and failure.user_failure_data.description:
                return failure.user_failure_data.description
            return _innermost(failure.error)
    for event in events:
        if event.is_run_failure:
            data = event.event_specific_data
            why = _innermost(data.error) if isinstance(data, JobFailureData) else ""
            return "\n".join(part for part in (event.message, why) if part)
    return ""


def _innermost(error: Any) -> str:
    while error is not None and error.cause is not None:
        error = error.cause
    return str(error.message).strip() if error is not None else ""


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def utc(timestamp: float) -> datetime:
    """A moment in seconds since 1970."""
    return datetime.fromtimestamp(timestamp, UTC)
