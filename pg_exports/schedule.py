"""When an export runs by itself, how old its newest interval may be, and in how many runs a backfill goes."""

import functools
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType

from pg_exports.partitions import Grid, IntervalLength

LENGTHS: Mapping[IntervalLength, timedelta] = {
    "every 5 minutes": timedelta(minutes=5),
    "every 15 minutes": timedelta(minutes=15),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
}
"""How long an interval is, but where clocks change."""


def schedule(
    export: str,
    job: Any,
    grid: Grid,
    partitions: dg.TimeWindowPartitionsDefinition,
    start: str | date | datetime,
    *,
    paused: bool,
) -> dg.ScheduleDefinition:
    """The schedule of an export: one minute after each interval's end a run of that interval."""

    @dg.schedule(
        name=f"{export}_schedule",
        job=job,
        cron_schedule=grid.schedule,
        execution_timezone=grid.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED if paused else dg.DefaultScheduleStatus.RUNNING,
        description=f"Exports {export} one minute after each interval's end.",
    )
    def newest_interval(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
            key = partitions.get_last_partition_key()
        if key is None:
            return dg.SkipReason(f"No interval is over yet: the first one begins at `start` {start}.")
        return dg.RunRequest(partition_key=key)

    return newest_interval


def freshness(interval: IntervalLength) -> dg.FreshnessPolicy:
    """When an export that runs by its schedule is late: a warning when one run is missing, a failure when two are."""
    length = LENGTHS[interval]
    return dg.FreshnessPolicy.time_window(
        warn_window=1.5 * length + timedelta(minutes=5), fail_window=2.5 * length + timedelta(minutes=10)
    )


def backfill_policy(max_partitions_per_run: int) -> dg.BackfillPolicy:
    """Runs of so many intervals for a backfill, which the daemon launches; one run for a range that `dg launch` is given.

    `dg launch` refuses ranges of an asset whose backfills may take several runs. What the UI and the daemon know of an asset
    they have from a code server.
    """
    return dg.BackfillPolicy.multi_run(max_partitions_per_run) if _is_code_server() else dg.BackfillPolicy.single_run()


# Once in a process: a code server loads the definitions to be read, and says so; then again to execute them.
@functools.cache
def _is_code_server() -> bool:
    is_said = DefinitionsLoadContext.is_set()
    return is_said and DefinitionsLoadContext.get().load_type is DefinitionsLoadType.INITIALIZATION
