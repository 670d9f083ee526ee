"""The sensor `lost_runs`, with runs in a Dagster instance, a broker and a worker that are real."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

pytest.importorskip("dagster_celery", reason="dagster-celery is not installed: `make cluster`")

from dagster._core.events import DagsterEventType
from dagster._core.storage.tags import WILL_RETRY_TAG
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.make_app import make_app
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG

from pg_exports import lost_runs
from pg_exports.lost_runs import Looks, active_tasks
from pg_exports_tests.cluster import deployment
from pg_exports_tests.cluster.deployment import BROKER, SETTINGS, Broker, broker
from pg_exports_tests.faults import eventually
from pg_exports_tests.ui.deployment import PATIENCE

STARTED, STARTING = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING


def test_a_run_is_overdue_only_when_no_look_found_it_for_a_minute() -> None:
    first = Looks().and_now({"a", "b"}, 1000.0)
    second = first.and_now({"a"}, 1040.0)
    third = second.and_now({"a", "b"}, 1060.0)
    assert (first.overdue(1000.0), second.overdue(1040.0), third.overdue(1060.0)) == ([], [], ["a"])


def test_what_is_given_up_is_missed_no_more_and_its_latest_tasks_are_remembered() -> None:
    looks = Looks({"a": 1.0, "b": 2.0}, tuple(str(number) for number in range(lost_runs.REMEMBERED)))
    after = looks.giving_up({"a": "task of a"})
    assert after.missing == {"b": 2.0}
    assert after.given_up == (*looks.given_up[1:], "task of a")


def test_every_worker_s_tasks_count() -> None:
    assert active_tasks({"one@a": [{"id": "x"}, {"id": "y"}], "two@b": []}) == {"x": "one@a", "y": "one@a"}


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server: `make cluster`")
    with broker(tmp_path_factory.mktemp("broker"), None) as running:
        yield running


@pytest.fixture
def instance(queue: Broker, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with the launcher and the retries of `deploy/celery`, and a storage of its own."""
    text = (SETTINGS / "dagster.yaml").read_text()
    head, rest = text.split("storage:", 1)
    (tmp_path / "dagster.yaml").write_text(head + rest[rest.index("run_launcher:") :])
    os.environ[BROKER] = queue.url
    try:
        with dg.DagsterInstance.from_config(str(tmp_path)) as opened:
            yield opened
    finally:
        del os.environ[BROKER]


@pytest.fixture(scope="module")
def worker(queue: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker that has nothing to do."""
    with deployment.worker(tmp_path_factory.mktemp("worker"), queue.url) as log:
        eventually(lambda: "ready." in log.read_text(), PATIENCE)
        yield


def run_with(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, task: str = "no such task") -> str:
    @dg.job
    def export() -> None:
        pass

    run = instance.create_run_for_job(export, status=status, tags={DAGSTER_CELERY_TASK_ID_TAG: task})
    return run.run_id


def look(instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[str, str]:
    """One look: what it says, and its cursor."""
    context = dg.build_sensor_context(instance, cursor=cursor)
    said = lost_runs.lost_runs(context)
    assert isinstance(said, dg.SkipReason)
    assert context.cursor
    return str(said.skip_message), context.cursor


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run
    return run.status


def test_a_run_that_no_worker_has_is_reported_at_the_second_look_and_will_be_retried(
    instance: dg.DagsterInstance, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_runs, "LOST_AFTER", 1)
    run_id = run_with(instance, STARTED)
    said, cursor = look(instance)
    assert "1 workers answer. Of 1 runs 1 are missing, 0 were reported" in said
    assert status_of(instance, run_id) is STARTED
    said, cursor = look(instance, cursor)
    assert "1 were reported as lost" in said
    run = instance.get_run_by_id(run_id)
    assert run
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert run.tags[WILL_RETRY_TAG] == "true"
    [failure] = instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
    assert "Lost with its worker" in failure.message
    said, _ = look(instance, cursor)
    assert "Of 0 runs 0 are missing" in said


def test_a_backfill_never_sees_a_lost_run_as_failed_for_good(
    instance: dg.DagsterInstance, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_runs, "LOST_AFTER", 0)
    run_id = run_with(instance, STARTED)
    tags: list[str | None] = []

    def report(run: dg.DagsterRun, message: str) -> None:
        before = instance.get_run_by_id(run_id)
        tags.append(before.tags.get(WILL_RETRY_TAG) if before else None)

    monkeypatch.setattr(instance, "report_run_failed", report)
    look(instance)
    assert tags == ["true"]


def test_a_run_that_waits_in_the_broker_is_not_missed(instance: dg.DagsterInstance, worker: None) -> None:
    run_with(instance, STARTING)
    assert "Of 1 runs 0 are missing" in look(instance)[0]


def test_a_run_that_ended_between_the_looks_is_left_alone(
    instance: dg.DagsterInstance, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_runs, "LOST_AFTER", 0)
    run_id = run_with(instance, STARTED)
    runs = lost_runs._runs_of_workers(instance)
    run = instance.get_run_by_id(run_id)
    assert run
    instance.report_run_canceled(run)
    # What the look had read before.
    monkeypatch.setattr(lost_runs, "_runs_of_workers", lambda _: runs)
    assert "0 were reported" in look(instance)[0]
    assert status_of(instance, run_id) is dg.DagsterRunStatus.CANCELED


def test_without_an_answer_of_the_broker_nothing_is_reported_and_what_was_missed_is_forgotten(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_runs, "LOST_AFTER", 0)
    run_id = run_with(instance, STARTED)
    launcher = instance.run_launcher
    assert isinstance(launcher, CeleryRunLauncher)
    monkeypatch.setattr(launcher, "celery", _unreachable(launcher))
    said, cursor = look(instance, f'{{"missing": {{"{run_id}": 1.0}}, "given_up": ["x"]}}')
    assert "The broker does not answer" in said
    assert cursor == '{"missing": {}, "given_up": ["x"]}'
    assert status_of(instance, run_id) is STARTED


def _unreachable(launcher: CeleryRunLauncher) -> object:
    """Celery's application of a launcher whose broker is a port where nobody listens."""
    nowhere = "redis://localhost:1/0"
    return make_app(launcher.app_args() | {"broker": nowhere, "backend": nowhere})


def test_an_instance_with_another_launcher_is_an_error_that_says_what_to_do() -> None:
    with (
        dg.DagsterInstance.ephemeral() as instance,
        pytest.raises(
            dg.DagsterInvariantViolationError, match=r"DAGSTER_HOME needs the dagster\.yaml of deploy/celery"
        ),
    ):
        look(instance)
