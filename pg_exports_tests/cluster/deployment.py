"""Storage, broker, webserver, daemon and workers, each a process of its own, with `deploy/celery` for their settings.

Workers are added, removed, killed and cut off here. What they did is `figures`'.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import redis
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG
from dagster_shared.yaml_utils import load_yaml_from_path

from pg_exports.lost_runs import Answers
from pg_exports.sandbox import Sandbox, certificates, postgres_server, servers
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports.sandbox.files import write_private
from pg_exports.sandbox.postgres_server import PostgresServer
from pg_exports_tests.cluster import exports
from pg_exports_tests.cluster.network import Network, network, relay
from pg_exports_tests.faults import eventually
from pg_exports_tests.ui.deployment import (
    PATIENCE,
    REPOSITORY,
    Deployment,
    answers_queries,
    free_port,
    has_healthy_daemons,
    process_in,
    program,
)

SETTINGS = REPOSITORY / "deploy" / "celery"
BROKER = "PG_EXPORTS_BROKER_URL"
POOL, LIMIT = "postgres", 3
"""The pool of the exports, and its limit: fewer than there are workers at times."""

WORKER_OPTIONS = ("--loglevel", "INFO", "--without-gossip", "--without-mingle")
"""As in `pg-exports-worker.service`."""


@dataclass
class Worker:
    """A Celery worker's process, its host's address, and what became of it."""

    name: str
    process: "subprocess.Popen[bytes]"
    address: str | None
    state: str = "runs"


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        deployment: its webserver.
        sandbox: its servers.
        network: the workers' hosts; None where this machine allows none, and workers are plain processes.
        workers: by name, those that are gone, too.
    """

    deployment: Deployment
    sandbox: Sandbox
    network: Network | None
    broker: "Broker"
    variables: Mapping[str, str]
    workers: dict[str, Worker] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.launcher = CeleryRunLauncher(default_queue="dagster", broker=self.broker.url, backend=self.broker.url)

    def add(self, *names: str) -> None:
        """Start workers with one run at a time each."""
        for name in names:
            on_host = self.network.add(name) if self.network else []
            command = (
                *on_host,
                *("env", f"PYTHONPATH={REPOSITORY}:{SETTINGS}", program("celery"), "--app", "dagster_celery.app"),
                *("worker", "--concurrency", "1", "--hostname", f"{name}@%h", *WORKER_OPTIONS),
            )
            started = self._stack.enter_context(process_in(self.deployment.folder, name, command, self.variables))
            self.workers[name] = Worker(name, started, self.network.address(name) if self.network else None)
            # At the end nobody waits for its run.
            self._stack.callback(self._end, name)

    def wait_for(self, *names: str) -> None:
        """Wait until workers answer."""
        eventually(lambda: set(names) <= set(self.doing()), PATIENCE)

    def _end(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.workers[name].process.pid, signal.SIGKILL)

    def kill(self, name: str) -> None:
        """SIGKILL to a worker and all of its processes."""
        os.killpg(self.workers[name].process.pid, signal.SIGKILL)
        self.workers[name].state = "killed"

    def cut_off(self, name: str) -> None:
        """Nothing reaches a worker any more, and nothing that it says is heard; it lives, and is not told."""
        if self.network:
            self.network.cut(name)
        else:
            os.killpg(self.workers[name].process.pid, signal.SIGSTOP)
        self.workers[name].state = "cut off"

    def heal(self, name: str) -> None:
        """A worker that was cut off is reached again."""
        if self.network:
            self.network.heal(name)
        else:
            os.killpg(self.workers[name].process.pid, signal.SIGCONT)
        self.workers[name].state = "cut off, back"

    def remove(self, name: str) -> None:
        """Ask a worker to end: it completes its run, and takes no other."""
        self.workers[name].process.send_signal(signal.SIGTERM)
        self.workers[name].state = "removed"

    def has_ended(self, name: str) -> bool:
        """Whether a worker's process is gone."""
        return self.workers[name].process.poll() is not None

    def doing(self) -> dict[str, list[str]]:
        """The Celery tasks that each worker has, of those that answer within a second."""
        answers: Answers = self.launcher.celery.control.inspect(timeout=1).active() or {}
        return {worker.partition("@")[0]: [task["id"] for task in tasks] for worker, tasks in answers.items()}

    def worker_of(self, run: Mapping[str, Any]) -> str | None:
        """Which worker began with a run, by the result backend."""
        task = run["tags"].get(DAGSTER_CELERY_TASK_ID_TAG)
        if task is None:
            return None
        result = self.launcher.celery.AsyncResult(task)
        began = result.info["hostname"] if result.state == "STARTED" else result.worker
        return str(began).partition("@")[0] if began else None

    def is_writing(self, name: str) -> bool:
        """Whether a worker is in the midst of a transaction with rows in it."""
        worker = self.workers[name]
        if worker.address:
            return self.transactions(f"client_addr = '{worker.address}'") > 0
        # 0 is no port: the list must not be empty.
        ports = ", ".join(str(port) for port in (0, *_ports_of(worker.process.pid)))
        return self.transactions(f"client_port IN ({ports})") > 0

    def transactions(self, where: str = "true") -> int:
        """How many exports are in the midst of a transaction with rows in it."""
        [(number,)] = self.rows(
            "SELECT count(*) FROM pg_stat_activity"
            f" WHERE application_name = 'pg_exports' AND backend_xid IS NOT NULL AND {where}"
        )
        return int(number)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a query as the superuser, in the database that the exports write to."""
        return self.sandbox.postgres.rows(sql, servers.DATABASE)


def _ports_of(group: int) -> set[int]:
    """The TCP ports from which the processes of a group have connected, by Linux's /proc."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile.
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                sockets |= {str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()}
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in sockets}


@dataclass(frozen=True)
class Broker:
    """A redis-server of the cluster's own, which speaks TLS alone."""

    folder: Path
    port: int
    password: str
    authority: Path

    @property
    def url(self) -> str:
        """As a secret in the environment has it."""
        return self.url_of(HOST, self.authority)

    def url_of(self, host: str, authority: Path) -> str:
        """The same for whoever calls it by another name, or trusts another authority."""
        verified = f"ssl_cert_reqs=required&ssl_ca_certs={authority}"
        return f"rediss://:{self.password}@{host}:{self.port}/0?{verified}"

    def waiting(self) -> int:
        """Messages that no worker has taken."""
        with redis.Redis.from_url(self.url) as client:
            # Celery's queue, and those of its priorities.
            return sum(int(client.llen(key)) for key in client.scan_iter("dagster*", _type="LIST"))


@contextlib.contextmanager
def broker(folder: Path, gateway: str | None, issued: Certificates | None = None) -> Iterator[Broker]:
    """Debian's redis-server with the settings of `deploy/celery`, for as long as the block lasts.

    Args:
        folder: where its files go.
        gateway: an address of this machine to listen at, too.
        issued: its certificate; without, one by an authority of its own.
    """
    server = shutil.which("redis-server")
    assert server, "There is no redis-server here: `apt-get install redis-server`."
    issued = issued or certificates.issue(folder / "tls")
    running = Broker(folder, free_port(), secrets.token_urlsafe(18), issued.authority)
    data = folder / "redis"
    data.mkdir()
    write_private(
        folder / "redis.conf",
        f"include {SETTINGS / 'redis.conf'}\nbind 127.0.0.1 {gateway or ''}\ntls-port {running.port}\n"
        f"tls-cert-file {issued.certificate}\ntls-key-file {issued.key}\n"
        f"requirepass {running.password}\ndir {data}\n",
    )
    with process_in(folder, "redis", (server, str(folder / "redis.conf")), {}):
        eventually(lambda: _pings(running), PATIENCE)
        yield running


def _pings(running: Broker) -> bool:
    with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(running.url) as client:
        return bool(client.ping())
    return False


@contextlib.contextmanager
def worker(folder: Path, broker_url: str) -> Iterator[Path]:
    """A Celery worker without a cluster, for as long as the block lasts. Its log, which ends with `ready.` once it is."""
    shutil.copy(SETTINGS / "dagster.yaml", folder)
    variables = {
        "DAGSTER_HOME": str(folder),
        BROKER: broker_url,
        "DAGSTER_POSTGRES_URL": "postgresql://nobody@localhost/none",
    }
    command = ("env", f"PYTHONPATH={SETTINGS}", program("celery"), "--app", "dagster_celery.app", "worker", "-c", "1")
    with process_in(folder, "worker", (*command, *WORKER_OPTIONS), variables):
        yield folder / "worker.log"


@contextlib.contextmanager
def cluster(
    folder: Path,
    sandbox: Sandbox,
    *workers: str,
    start: str,
    chunk: int,
    seconds: Mapping[str, int] = MappingProxyType({}),
    variables: Mapping[str, str] = MappingProxyType({}),
    on_hosts: bool = True,
) -> Iterator[Cluster]:
    """Start a cluster, with a sandbox for its servers; everything is killed at the end.

    Args:
        folder: an empty folder, its DAGSTER_HOME.
        sandbox: ClickHouse, and the Postgres of both the exports and Dagster's storage, which nobody else uses.
        workers: the names of those that are there from the beginning.
        start: of the export `events`, ISO.
        chunk: intervals of one run.
        seconds: changes to `run_monitoring`.
        variables: changes to the environment.
        on_hosts: each worker in a network namespace of its own, where the machine allows that. What it says to the servers
            goes through a relay in Python.
    """
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network()) if on_hosts else None
        if hosts:
            _open(sandbox.postgres, hosts)
            assert sandbox.clickhouse.https_port
            stack.enter_context(relay(hosts.gateway, sandbox.clickhouse.https_port))
        queue = stack.enter_context(broker(folder, hosts.gateway if hosts else None))
        environment = {
            **sandbox.environment(),
            "DAGSTER_HOME": str(folder),
            BROKER: queue.url,
            exports.START: start,
            exports.CHUNK: str(chunk),
            **variables,
        }
        _write_settings(folder, seconds)
        deployment = Deployment(folder, free_port())
        running = Cluster(deployment, sandbox, hosts, queue, environment)
        stack.enter_context(running._stack)
        # They take as long to start as the servers.
        running.add(*workers)
        stack.enter_context(_servers_of(deployment, environment))
        running.wait_for(*workers)
        yield running


def _open(server: PostgresServer, hosts: Network) -> None:
    """Let the hosts reach a Postgres that listens for this machine alone."""
    data = server.folder / "data"
    with (data / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"listen_addresses = 'localhost,{hosts.gateway}'\n")
    with (data / "pg_hba.conf").open("a") as access:
        access.write(f"hostssl all all {hosts.addresses} scram-sha-256\n")
    postgres_server.restart(server)


def _write_settings(folder: Path, seconds: Mapping[str, int]) -> None:
    """The files of `deploy/celery`, less patient, with the cluster's own export for the repository's."""
    settings = load_yaml_from_path(str(SETTINGS / "dagster.yaml"))
    assert isinstance(settings, dict)
    settings["run_monitoring"] |= seconds
    # JSON is YAML.
    (folder / "dagster.yaml").write_text(json.dumps(settings, indent=2))
    workspace = (SETTINGS / "workspace.yaml").read_text()
    (folder / "workspace.yaml").write_text(workspace.replace("pg_exports.definitions", exports.__name__))


@contextlib.contextmanager
def _servers_of(deployment: Deployment, variables: Mapping[str, str]) -> Iterator[None]:
    """Webserver and daemon."""
    folder = deployment.folder
    commands: dict[str, Sequence[str]] = {
        "webserver": (program("dagster-webserver"), "-w", "workspace.yaml", "-p", str(deployment.port)),
        "daemon": (sys.executable, "-m", "pg_exports_tests.ui.daemon", "run", "-w", "workspace.yaml"),
    }
    # It also makes the storage's tables, for which the two others would get in each other's way.
    set_limit = (program("dagster"), "instance", "concurrency", "set", POOL, str(LIMIT))
    with process_in(folder, "dagster", set_limit, variables) as setting:
        assert setting.wait(PATIENCE) == 0, deployment.log("dagster")
    with (
        process_in(folder, "webserver", commands["webserver"], variables) as webserver,
        process_in(folder, "daemon", commands["daemon"], variables) as daemon,
    ):
        eventually(lambda: webserver.poll() is not None or answers_queries(deployment), PATIENCE)
        assert webserver.poll() is None, deployment.log("webserver")
        eventually(lambda: daemon.poll() is not None or has_healthy_daemons(deployment), PATIENCE)
        assert daemon.poll() is None, deployment.log("daemon")
        yield
