"""Exports whose process is killed: nothing partial is seen, and the next run completes the interval.

The processes are those of a deployment: `dg launch`, and the daemon with the queue. Each runs in a folder that is the
repository but for its `.env`, and with a Postgres of the test's own, which also holds Dagster's storage: what one test's
daemon has recorded, such as a sensor's last tick, must not hold back the next one's.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from pg_exports import late_rows
from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import (
    EACH_ROW_ONCE,
    MIDDLE,
    NOTHING,
    eventually,
    fill,
    held_before_commit,
    landed,
    make_tables,
    with_own_postgres,
)
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.source_rows import event, export_of, insert_sessions, mapping, new_session, person, session


@pytest.fixture
def own_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with a Postgres in whose schema `public` nobody else writes."""
    with with_own_postgres(sandbox) as running:
        yield running


@pytest.fixture
def landing(own_sandbox: Sandbox) -> Target:
    """Where the shipped exports write."""
    return Target(own_sandbox, "public")


@pytest.fixture
def proxy(own_sandbox: Sandbox) -> Iterator[TcpProxy]:
    """Between the exports and their Postgres, but not between Dagster and its storage."""
    with tcp_proxy(own_sandbox.postgres.port) as running:
        yield running


@pytest.fixture
def deployment(own_sandbox: Sandbox, source: Source, proxy: TcpProxy, repository: Path, tmp_path: Path) -> Path:
    """The repository's root with an `.env` of the test's own."""
    for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml", "pg_exports"):
        (tmp_path / name).symlink_to(repository / name)
    environment = own_sandbox.environment() | {
        "CLICKHOUSE_DATABASE": source.database,
        "POSTGRES_PORT": str(proxy.port),
        "DAGSTER_HOME": str(tmp_path),
    }
    (tmp_path / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in environment.items()))
    return tmp_path


@contextlib.contextmanager
def process(folder: Path, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """One of the commands installed beside this Python, in a folder; killed with its children where it outlives the block."""
    program = Path(sys.executable).parent / words[0]
    with (folder / f"{words[0]}.log").open("ab") as log:
        started = subprocess.Popen([program, *words[1:]], cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield started
    finally:
        kill(started)


def kill(started: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a command and its children: they can do nothing more, not even hang up in good order."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def test_a_launch_that_is_killed_before_its_commit_leaves_nothing_and_the_next_one_completes_the_interval(
    source: Source, landing: Target, deployment: Path, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    make_tables(run, landing, hour)
    launch = ("dg", "launch", "--assets", "events", "--partition", partition_key(hour))
    with held_before_commit(landing) as hold:
        with process(deployment, *launch) as killed:
            eventually(lambda: hold.is_reached or killed.poll() is not None, seconds=120)
            assert killed.poll() is None, log(deployment, "dg")
            kill(killed)
        hold.release()
    assert landed(landing) == NOTHING
    with process(deployment, *launch) as completing:
        assert completing.wait(120) == 0, log(deployment, "dg")
    assert landed(landing) == EACH_ROW_ONCE


def test_a_queued_run_that_is_killed_in_mid_copy_is_noticed_by_the_daemon_and_run_again(
    source: Source, landing: Target, deployment: Path, proxy: TcpProxy, hour: datetime
) -> None:
    fill(source, hour)
    is_copying = proxy.after(MIDDLE, proxy.freeze)
    tags = json.dumps({"dagster/partition": partition_key(hour)})
    submit = ("dagster", "job", "launch", "-w", "workspace.yaml", "-j", "events_job", "--tags", tags)
    with (
        process(deployment, "dagster-daemon", "run", "-w", "workspace.yaml"),
        process(deployment, *submit) as submitted,
    ):
        assert submitted.wait(120) == 0, log(deployment, "dagster")
        assert is_copying.wait(120), log(deployment, "dagster-daemon")
        with dagster_of(deployment) as instance:
            [run] = queued_runs(instance, partition_key(hour))
            os.kill(process_of(instance, run), signal.SIGKILL)
            proxy.thaw()
            assert landed(landing) == NOTHING
            eventually(lambda: len(queued_runs(instance, partition_key(hour))) == 2, seconds=60)
            eventually(lambda: queued_runs(instance, partition_key(hour))[0].is_finished, seconds=60)
            retried, killed = queued_runs(instance, partition_key(hour))
    assert (killed.status, retried.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
    assert retried.parent_run_id == killed.run_id
    assert landed(landing) == EACH_ROW_ONCE


def test_the_daemon_requests_intervals_with_late_rows_and_their_runs_bring_the_rows(
    source: Source, landing: Target, deployment: Path, run: RunExport, hour: datetime
) -> None:
    models = ("events", "persons", "sessions")

    def insert(number: int, moment: datetime) -> None:
        source.insert("events", event(moment))
        source.insert("person", person(moment, uuid.UUID(int=number), 1))
        source.insert("person_distinct_id2", mapping(moment, f"{number}", uuid.UUID(int=number)))
        insert_sessions(source, session(new_session(moment), moment))

    def counts() -> list[int]:
        return [landing.count(model) for model in models]

    insert(1, hour)
    for model in models:
        first = run(export_of(model, landing, hour), partition_key(hour), postgres=landing.resource())
        assert first.counts == (1, 0, 0)
    insert(2, hour + 58 * timedelta(minutes=1))
    with process(deployment, "dagster-daemon", "run", "-w", "workspace.yaml"), dagster_of(deployment) as instance:
        eventually(
            lambda: counts() == [2, 2, 2],
            seconds=120,
            otherwise=lambda: f"Rows: {counts()}. {log(deployment, 'dagster-daemon')}",
        )
        late = dg.RunsFilter(tags=late_rows.TAGS | {"dagster/partition": partition_key(hour)})
        eventually(lambda: all(one.is_finished for one in instance.get_runs(late)), seconds=60)
        found = instance.get_runs(late)
        assert {one.job_name for one in found} == {f"{model}_job" for model in models}
        assert {one.status for one in found} == {dg.DagsterRunStatus.SUCCESS}
    assert counts() == [2, 2, 2]


@contextlib.contextmanager
def dagster_of(folder: Path) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of a deployment."""
    with pytest.MonkeyPatch.context() as patch:
        for line in (folder / ".env").read_text().splitlines():
            name, value = line.split("=", 1)
            patch.setenv(name, value.strip("'"))
        with dg.DagsterInstance.from_config(str(folder)) as instance:
            yield instance


def queued_runs(instance: dg.DagsterInstance, partition: str) -> Sequence[dg.DagsterRun]:
    """The runs of the export's job for a partition, the newest first; those of `dg launch` are of another job."""
    return instance.get_runs(dg.RunsFilter(job_name="events_job", tags={"dagster/partition": partition}))


def process_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> int:
    """The process that executes a run."""
    said = " ".join(entry.user_message for entry in instance.all_logs(run.run_id))
    return int(re.findall(r"Executing steps in process \(pid: (\d+)\)", said)[0])


def log(folder: Path, command: str) -> str:
    """The end of what a command printed."""
    return (folder / f"{command}.log").read_text(errors="replace")[-3000:]
