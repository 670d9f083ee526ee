"""A deployment as its users have it: a folder that is the repository but for its `.env`, with Dagster's webserver and
daemon as processes of their own. What is asked of it here goes through GraphQL, as the UI does.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import INSTANCE
from pg_exports_tests.faults import eventually, storage_by_socket
from pg_exports_tests.ui import queries

REPOSITORY = Path(__file__).parent.parent.parent
LOCATION = {"repositoryLocationName": "pg_exports", "repositoryName": "__repository__"}

PATIENCE = 180
"""Seconds until which something must have happened, on a machine that has much else to do."""


@dataclass(frozen=True)
class Deployment:
    """Where the webserver of a running deployment answers.

    Attributes:
        folder: its root, with the logs of its processes.
        port: the webserver's, on 127.0.0.1.
    """

    folder: Path
    port: int

    @property
    def url(self) -> str:
        """The UI's address."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, query: str, **variables: object) -> Any:
        """The answer to a GraphQL query or mutation that has one field, which must be no error."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert not answer.get("errors"), answer["errors"]
        [field] = answer["data"].values()
        assert not (isinstance(field, dict) and "Error" in str(field.get("__typename"))), field
        return field

    def backfill(self, asset: str, partitions: Sequence[str], *, page_of: str | None = None) -> str:
        """Launch a backfill as the dialog *Materialize* does, on the asset's page or on that of a job. Its id."""
        parameters: dict[str, object] = {
            "tags": [{"key": "dagster/from_ui", "value": "true"}],
            "assetSelection": [{"path": [asset]}],
            "partitionNames": list(partitions),
            "fromFailure": False,
        }
        if page_of:
            parameters["selector"] = {"partitionSetName": f"{page_of}_partition_set", "repositorySelector": LOCATION}
        return str(self.ask(queries.LAUNCH_BACKFILL, parameters=parameters)["backfillId"])

    def launch(self, job: str, config: Mapping[str, object], *, partition: str | None = None) -> dict[str, Any]:
        """Launch a run of a job as its launchpad does, with a configuration of one's own. What GraphQL answers."""
        tags = [{"key": "dagster/partition", "value": partition}] if partition else []
        parameters = {
            "selector": {**LOCATION, "pipelineName": job},
            "runConfigData": config,
            "executionMetadata": {"tags": tags},
            "mode": "default",
        }
        return dict(self.ask(queries.LAUNCH_RUN, parameters=parameters))

    def status(self, backfill: str) -> str:
        """A backfill's status."""
        return str(self.ask(queries.BACKFILL, id=backfill)["status"])

    def cancel(self, backfill: str) -> None:
        """Ask for a backfill's end."""
        self.ask(queries.CANCEL_BACKFILL, id=backfill)

    def wait(self, *backfills: str, status: str = "COMPLETED_SUCCESS", seconds: float = PATIENCE) -> None:
        """Wait until backfills have ended with a status."""

        def is_over() -> bool:
            found = [self.status(backfill) for backfill in backfills]
            assert not {"FAILED", "COMPLETED_FAILED", "COMPLETED", "CANCELED"} - {status} & set(found), found
            return set(found) == {status}

        eventually(is_over, seconds)

    def runs(self, backfill: str) -> list[dict[str, Any]]:
        """A backfill's runs, the newest first, each with `runId`, `status` and `tags`."""
        tags = [{"key": "dagster/backfill", "value": backfill}]
        runs = self.ask(queries.RUNS, filter={"tags": tags})["results"]
        return [run | {"tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in runs]

    def partitions(self, asset: str) -> dict[str, bool]:
        """All keys of an asset's partitions, oldest first, and whether each is shown as materialised."""
        node = self.ask(queries.PARTITIONS, key={"path": [asset]})
        shown = node["assetPartitionStatuses"]["ranges"]
        [dimension] = node["partitionKeysByDimension"]
        keys = dimension["partitionKeys"]
        done = {
            key
            for span in shown
            if span["status"] == "MATERIALIZED"
            for key in keys[keys.index(span["startKey"]) : keys.index(span["endKey"]) + 1]
        }
        return {key: key in done for key in keys}

    def schedule_status(self, name: str) -> str:
        """RUNNING or STOPPED."""
        return str(self._schedule(name)["status"])

    def stop_schedule(self, name: str) -> None:
        """Switch a schedule off."""
        self.ask(queries.STOP_SCHEDULE, id=self._schedule(name)["id"])

    def start_schedule(self, name: str) -> None:
        """Switch a schedule on."""
        self.ask(queries.START_SCHEDULE, selector={**LOCATION, "scheduleName": name})

    def pause(self) -> None:
        """Switch all schedules and sensors off."""
        automation = self.ask(queries.AUTOMATION, selector=LOCATION)
        for schedule in automation["schedules"]:
            self.stop_schedule(schedule["name"])
        for sensor in automation["sensors"]:
            self.ask(queries.STOP_SENSOR, id=sensor["sensorState"]["id"])

    def _schedule(self, name: str) -> dict[str, Any]:
        return dict(self.ask(queries.SCHEDULE, selector={**LOCATION, "scheduleName": name})["scheduleState"])

    def log(self, process: str) -> str:
        """The end of what a process printed."""
        return (self.folder / f"{process}.log").read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def deployed(folder: Path, sandbox: Sandbox, *, paused: bool = False, **environment: str) -> Iterator[Deployment]:
    """Start a deployment of the repository's exports, with a sandbox for its servers; killed at the end.

    Args:
        folder: an empty folder, its root.
        sandbox: ClickHouse, and the Postgres of both the exports and Dagster's storage, the latter by its socket.
        paused: all schedules and sensors are off before the daemon looks at them.
        environment: changes to the sandbox's variables.
    """
    for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml", "pg_exports"):
        (folder / name).symlink_to(REPOSITORY / name)
    variables = {
        **sandbox.environment(),
        "DAGSTER_POSTGRES_URL": storage_by_socket(sandbox.postgres, INSTANCE),
        "DAGSTER_HOME": str(folder),
        **environment,
    }
    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))
    deployment = Deployment(folder, free_port())
    webserver = (program("dagster-webserver"), "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(deployment.port))
    daemon = (sys.executable, "-m", "pg_exports_tests.ui.daemon", "run", "-w", "workspace.yaml")
    set_limit = (program("dagster"), "instance", "concurrency", "set", "postgres", "4")
    with process_in(folder, "dagster", set_limit, variables) as setting:
        assert setting.wait(PATIENCE) == 0, deployment.log("dagster")
    with process_in(folder, "webserver", webserver, variables) as server:
        eventually(lambda: server.poll() is not None or answers_queries(deployment), PATIENCE)
        assert server.poll() is None, deployment.log("webserver")
        if paused:
            deployment.pause()
        with process_in(folder, "daemon", daemon, variables) as running:
            eventually(lambda: running.poll() is not None or has_healthy_daemons(deployment), PATIENCE)
            assert running.poll() is None, deployment.log("daemon")
            yield deployment


def answers_queries(deployment: Deployment) -> bool:
    with contextlib.suppress(OSError):
        deployment.ask(queries.AUTOMATION, selector=LOCATION)
        return True
    return False


def has_healthy_daemons(deployment: Deployment) -> bool:
    return all(daemon["healthy"] for daemon in deployment.ask(queries.DAEMONS)["daemonHealth"]["allDaemonStatuses"])


@contextlib.contextmanager
def process_in(
    folder: Path, name: str, command: Sequence[str], variables: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a folder, with a log of its name; killed with its children."""
    with (folder / f"{name}.log").open("ab") as log:
        started = subprocess.Popen(
            command, cwd=folder, env=_environment(variables), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield started
    finally:
        # In good order: the runs are sessions of their own, and end with the code server that started them.
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.send_signal(signal.SIGTERM)
            started.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)}


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
