"""A code location of its own for deployments with Celery workers: one sensor, which finds the runs of workers that are gone.

Dagster's run monitoring asks Celery's result backend. That knows when a run's process dies under a worker that lives; of a
run whose worker is gone with its host it says "started" for ever. Here the workers themselves are asked, by Celery's remote
control. A run that none of them has is reported as failed, and Dagster's own run retries start it on another one. A single
machine loads nothing of this: `deploy/celery/workspace.yaml` lists it.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import dagster as dg
from dagster._core.execution.retries import auto_reexecution_should_retry_run
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import WILL_RETRY_TAG
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG
from kombu.exceptions import OperationalError
from redis import RedisError

LOST_AFTER = float(os.environ.get("PG_EXPORTS_LOST_AFTER") or 60)
"""Seconds in which no worker had a run, at any look. A worker that lost the broker asks for it again every 30 s or oftener."""

SECONDS_BETWEEN_LOOKS = int(os.environ.get("PG_EXPORTS_LOST_RUNS_INTERVAL") or 20)

ANSWER_TIMEOUT = 3
"""Seconds that workers have to answer. All of them pass: nobody knows how many workers there are."""

REMEMBERED = 200
"""How many runs that were given up are remembered."""

Answers = Mapping[str, list[dict[str, Any]]]
"""What each worker is doing, as Celery's `inspect().active()` gives it."""


@dataclass(frozen=True)
class Looks:
    """What the looks so far have found: the sensor's cursor.

    Attributes:
        missing: since when (Unix time) no worker has had a run, by the run's id.
        given_up: the Celery tasks of runs that were reported as failed, the latest last.
    """

    missing: Mapping[str, float] = field(default_factory=dict)
    given_up: tuple[str, ...] = ()

    def and_now(self, missing: set[str], now: float) -> "Looks":
        """One look more: a run that some worker has is not missing any more, whatever was found before."""
        return Looks({run_id: self.missing.get(run_id, now) for run_id in sorted(missing)}, self.given_up)

    def overdue(self, now: float) -> list[str]:
        """The runs that have been missing for so long that their worker counts as gone."""
        return [run_id for run_id, since in self.missing.items() if now - since >= LOST_AFTER]

    def giving_up(self, tasks: Mapping[str, str]) -> "Looks":
        """Without some runs, whose tasks are remembered instead. By the run's id."""
        missing = {run_id: since for run_id, since in self.missing.items() if run_id not in tasks}
        return Looks(missing, (*self.given_up, *tasks.values())[-REMEMBERED:])


def active_tasks(answers: Answers) -> dict[str, str]:
    """Which worker has a task, for each that one has."""
    return {str(task["id"]): worker for worker, doing in answers.items() for task in doing}


@dg.sensor(
    name="lost_runs",
    minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports runs as failed whose Celery worker is gone, so that Dagster starts them on another one.",
)
def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Look once, and say what there was to see.

    Raises:
        DagsterInvariantViolationError: the instance launches runs in another way.
    """
    instance = context.instance
    launcher = instance.run_launcher
    if not isinstance(launcher, CeleryRunLauncher):
        raise dg.DagsterInvariantViolationError(
            f"This instance launches runs by {type(launcher).__name__}, not by Celery's workers. "
            "DAGSTER_HOME needs the dagster.yaml of deploy/celery; otherwise take pg_exports.lost_runs out of workspace.yaml."
        )
    looks = _looks(context.cursor)
    # The runs first: one that begins or ends meanwhile is not among them, or not missed a second time.
    runs = {run.run_id: run for run in _runs_of_workers(instance)}
    try:
        answers: Answers = launcher.celery.control.inspect(timeout=ANSWER_TIMEOUT).active() or {}
        active = active_tasks(answers)
        missing = {run_id for run_id, run in runs.items() if _task(run) not in active and _was_taken(launcher, run)}
    except (OperationalError, RedisError, OSError) as error:
        _keep(context, looks.and_now(set(), 0))
        return dg.SkipReason(f"The broker does not answer, so nothing is known of the workers: {error}")
    if not answers:
        _keep(context, looks.and_now(set(), 0))
        return dg.SkipReason(f"No worker answers. {len(runs)} runs wait for one: none could start them elsewhere.")
    _end_what_was_given_up(context, launcher, looks, active)
    now = time.time()
    looks = looks.and_now(missing, now)
    reported = {
        run_id: _task(runs[run_id])
        for run_id in looks.overdue(now)
        if _report(context, launcher, run_id, now - looks.missing[run_id])
    }
    looks = looks.giving_up(reported)
    _keep(context, looks)
    return dg.SkipReason(
        f"{len(answers)} workers answer. Of {len(runs)} runs {len(looks.missing)} are missing, "
        f"{len(reported)} were reported as lost."
    )


def _looks(cursor: str | None) -> Looks:
    kept = json.loads(cursor) if cursor else {}
    return Looks(kept.get("missing", {}), tuple(kept.get("given_up", ())))


def _keep(context: dg.SensorEvaluationContext, looks: Looks) -> None:
    context.update_cursor(json.dumps(asdict(looks)))


def _runs_of_workers(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """The runs that were sent to a worker and have not ended."""
    statuses = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    return [
        run for run in instance.get_runs(dg.RunsFilter(statuses=statuses)) if DAGSTER_CELERY_TASK_ID_TAG in run.tags
    ]


def _task(run: dg.DagsterRun) -> str:
    return run.tags[DAGSTER_CELERY_TASK_ID_TAG]


def _was_taken(launcher: CeleryRunLauncher, run: dg.DagsterRun) -> bool:
    """Whether a worker has begun with a run. One that is starting may wait in the broker, where it is not lost."""
    if run.status is dg.DagsterRunStatus.STARTED:
        return True
    return launcher.check_run_worker_health(run).status in (WorkerStatus.RUNNING, WorkerStatus.FAILED)


def _report(context: dg.SensorEvaluationContext, launcher: CeleryRunLauncher, run_id: str, seconds: float) -> bool:
    """Report a run as failed, unless it has ended meanwhile."""
    run = context.instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return False
    message = (
        f"Lost with its worker: {_worker(launcher, run)} began with this run, and for {seconds:.0f} s no worker that answers "
        "has had it. Dagster starts it again on another worker, if `run_retries` has tries left. What it has committed "
        "stays; Postgres undoes the interval that was being written, of a host that was cut off after up to three minutes. "
        "Look at that host: does it run, does it reach the broker, what does the worker's log say?"
    )
    # Dagster sets this tag when the run has failed already. A backfill that looks in between counts it as failed for good.
    failed = run.with_status(dg.DagsterRunStatus.FAILURE)
    will_retry = context.instance.run_retries_enabled and auto_reexecution_should_retry_run(
        context.instance, failed, None
    )
    context.instance.add_run_tags(run_id, {WILL_RETRY_TAG: str(will_retry).lower()})
    context.instance.report_run_failed(run, message)
    context.log.warning(f"Run {run_id}: {message}")
    return True


def _worker(launcher: CeleryRunLauncher, run: dg.DagsterRun) -> str:
    """Which worker began with a run, as Celery calls it."""
    began = launcher.celery.AsyncResult(_task(run)).info
    name = began.get("hostname") if isinstance(began, dict) else None
    return f"Celery worker {name}" if name else "a Celery worker"


def _end_what_was_given_up(
    context: dg.SensorEvaluationContext, launcher: CeleryRunLauncher, looks: Looks, active: Mapping[str, str]
) -> None:
    """Kill what a worker that is back still runs of a run that was given up: its slot in the pool is another run's."""
    for task in looks.given_up:
        if task in active:
            context.log.warning(
                f"{active[task]} is back, and is told to end task {task}: its run was given up as lost."
            )
            launcher.celery.control.revoke(task, terminate=True, signal="SIGKILL")


defs = dg.Definitions(sensors=[lost_runs])
