"""The units of `deploy/systemd` and `deploy/celery`: as systemd reads them, and the services that it starts from them.

The machine on which they start is set up by the commands of docs/set-up.md.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import pytest

from pg_exports.sandbox import Sandbox, source_tables
from pg_exports.sandbox.certificates import HOST
from pg_exports_tests.cluster.deployment import BROKER, broker
from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.deploy.machine import UNITS as UNITS_OF_SYSTEMD
from pg_exports_tests.deploy.machine import Machine, is_possible, machine
from pg_exports_tests.faults import eventually
from pg_exports_tests.python_versions import copy_repository
from pg_exports_tests.source_rows import event
from pg_exports_tests.ui.deployment import PATIENCE, Deployment, answers_queries, free_port, has_healthy_daemons

REPOSITORY = Path(__file__).parent.parent.parent
FOLDERS = {"single": ("systemd",), "celery": ("systemd", "celery")}
"""The folders of `deploy` whose units a host has; a later one's take the place of an earlier one's."""

UNITS = [
    (name, unit.name)
    for name, folders in FOLDERS.items()
    for unit in sorted((REPOSITORY / "deploy" / folders[-1]).glob("*.service"))
]

MOST_EXPOSED = 20
"""Of 100, by `systemd-analyze security`. Its own word for up to 20 is OK; a unit without any restriction has 96."""

CODE = "/srv/pg_exports"

AUTHORITY = "/etc/ssl/sandbox.crt"
"""Where the machine has the certificate of the sandbox's authority."""

ROWS = 100


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with nothing but the units of a host, and programs by the names that they start."""
    units = tmp_path / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    for target in UNITS_OF_SYSTEMD.glob("*.target"):
        shutil.copy(target, units)
    programs = tmp_path / CODE[1:] / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("dagster-daemon", "dagster-webserver", "celery"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    return tmp_path


def install(root: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        for path in (REPOSITORY / "deploy" / folder).glob("pg-exports-*"):
            place = root / "etc" / "systemd" / "system" / path.name
            shutil.copytree(path, place) if path.is_dir() else shutil.copy(path, place)


def analyse(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    command = (program, *words, f"--root={root}")
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("host", "unit"), UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(root: Path, host: str, unit: str) -> None:
    install(root, FOLDERS[host])
    said = analyse(root, "verify", unit)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")
    place = root / "etc" / "systemd" / "system" / unit
    place.write_text(place.read_text().replace("Restart=", "Restarts="))
    assert "Restarts" in analyse(root, "verify", unit).stderr


@pytest.mark.parametrize(("host", "unit"), UNITS)
def test_a_unit_is_hardly_exposed(root: Path, host: str, unit: str) -> None:
    install(root, FOLDERS[host])
    words = ("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", unit)
    said = analyse(root, *words)
    assert said.returncode == 0, said.stdout
    shutil.rmtree(root / "etc" / "systemd" / "system" / "pg-exports-.service.d")
    assert analyse(root, *words).returncode != 0


@pytest.mark.parametrize(("host", "unit"), UNITS)
def test_a_unit_never_starts_without_the_restrictions(host: str, unit: str) -> None:
    folder = "/etc/systemd/system/pg-exports-.service.d"
    text = (REPOSITORY / "deploy" / FOLDERS[host][-1] / unit).read_text()
    assert f"\nAssertPathExists={folder}/10-common.conf\n" in text


needs_namespaces = pytest.mark.skipif(not is_possible(), reason="a machine with systemd takes Linux, root and systemd")


@dataclass(frozen=True)
class Host:
    """A machine on which the services run, its web server, and the ClickHouse database from which it exports."""

    machine: Machine
    web: Deployment
    source: Source

    def as_service(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a program of `.venv` as the services run."""
        return self.machine.run(f"{CODE}/deploy/systemd/as-service", *command, check=False)


@pytest.fixture(scope="module")
def host(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A machine that is set up by the second step of docs/set-up.md's section Production."""
    production = (REPOSITORY / "docs" / "set-up.md").read_text().partition("## Production")[2]
    [commands] = [block for block in blocks(production) if "useradd" in block]
    with started(tmp_path_factory.mktemp("machine"), sandbox, commands, "systemd") as running:
        yield running


@pytest.fixture
def cluster_host(sandbox: Sandbox, tmp_path: Path) -> Iterator[Host]:
    """A machine that is set up by docs/cluster.md, with daemon, web server and worker; the broker is this one's."""
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    [code] = [block for block in blocks(page) if "useradd" in block]
    [units] = [block for block in blocks(page) if "pg-exports-worker.service" in block]
    commands = (
        f"{code[code.index('useradd') :]}{units}"
        "cp deploy/celery/pg-exports-daemon.service deploy/celery/pg-exports-webserver.service /etc/systemd/system/\n"
        "systemctl daemon-reload\n"
        "deploy/systemd/as-service dagster instance concurrency set postgres 4\n"
        "systemctl enable --now pg-exports-daemon pg-exports-webserver\n"
    )
    with broker(tmp_path, None) as queue:
        url = queue.url_of(HOST, Path("/etc/ssl/pg_exports/broker-ca.crt"))
        files = {queue.authority: "/etc/ssl/pg_exports/broker-ca.crt"}
        with started(tmp_path, sandbox, commands, "celery", {BROKER: f"'{url}'"}, files) as running:
            yield running


def blocks(page: str) -> list[str]:
    """The commands of a page."""
    return re.findall(r"```sh\n(.+?)```", page, re.DOTALL)


@contextlib.contextmanager
def started(
    folder: Path,
    sandbox: Sandbox,
    commands: str,
    units: str,
    variables: Mapping[str, str] = MappingProxyType({}),
    files: Mapping[Path, str] = MappingProxyType({}),
) -> Iterator[Host]:
    """A machine on which the services run.

    Args:
        folder: where its files are prepared.
        sandbox: its servers.
        commands: what sets it up, in the repository's folder.
        units: the folder of `deploy` that its units come from.
        variables: further ones than the sandbox's.
        files: further ones of this machine, and where it has them.
    """
    web = Deployment(folder, free_port())
    source = Source(sandbox, f"test_{uuid.uuid4().hex[:12]}")
    source_tables.create_tables(sandbox.execute, source.database)
    authority = sandbox.certificates.authority
    there = {name: value.replace(str(authority), AUTHORITY) for name, value in sandbox.environment().items()}
    lay(
        folder / "over",
        # Python's library is looked for in the folder for which it was built, and that may be a home.
        there | {"CLICKHOUSE_DATABASE": source.database, "LD_LIBRARY_PATH": "/opt/python/lib", **variables},
        {authority: AUTHORITY, **files},
    )
    serve_at(web.port, folder / "over", units)
    mounts = {Path(sys.base_prefix): "/opt/python", packages(): "/opt/packages"}
    with machine(folder, folder / "over", mounts) as running:
        try:
            running.shell(f"cd {CODE}\nexport EDITOR='cp /variables'\n{commands}")
            eventually(lambda: answers_queries(web), PATIENCE)
            eventually(lambda: has_healthy_daemons(web), PATIENCE)
            yield Host(running, web, source)
        except AssertionError:
            sys.stderr.write(running.log("pg-exports-*"))
            raise
    sandbox.execute(f"DROP DATABASE {source.database} SYNC")


def packages() -> Path:
    return Path(pytest.__file__).parent.parent


def lay(over: Path, variables: Mapping[str, str], files: Mapping[Path, str]) -> None:
    """What the machine has before its set-up: the repository with its `.venv`, variables that are to be typed in, files."""
    code = over / CODE[1:]
    code.mkdir(parents=True)
    copy_repository(code)
    lay_environment(code / ".venv")
    for source, place in files.items():
        target = over / place[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (over / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def serve_at(port: int, over: Path, units: str) -> None:
    """Have the web server listen at another port: this machine's network is the other one's, and 3000 may be taken."""
    unit = (REPOSITORY / "deploy" / units / "pg-exports-webserver.service").read_text()
    [command] = re.findall(r"ExecStart=(.+)", unit)
    own = over / "etc" / "systemd" / "system" / "pg-exports-webserver.service.d" / "port.conf"
    own.parent.mkdir(parents=True)
    own.write_text(f"[Service]\nExecStart=\nExecStart={command.replace('3000', str(port))}\n")


def lay_environment(folder: Path) -> None:
    """A virtual environment with the packages of this one."""
    (folder / "bin").mkdir(parents=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (site / "packages.pth").write_text(f"{CODE}\n/opt/packages\n")
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
    (folder / "bin" / "python").symlink_to(f"/opt/python/bin/{Path(sys.executable).resolve().name}")
    for name in ("dagster", "dagster-daemon", "dagster-webserver", "dg", "celery"):
        _, body = Path(sys.executable).with_name(name).read_text().split("\n", 1)
        (folder / "bin" / name).write_text(f"#!{CODE}/.venv/bin/python\n{body}")
        (folder / "bin" / name).chmod(0o755)


PROBE = """
import os, pathlib

print("root" if os.geteuid() == 0 else "no root")
for folder in ("/srv/pg_exports", "/srv/pg_exports/pg_exports/defs", "/srv/pg_exports/.venv", "/var/lib/pg_exports", "/etc",
               "/var/lib/pg_exports/storage", "/tmp"):
    try:
        pathlib.Path(folder, "probe").write_text("")
        print("writes in", folder)
        pathlib.Path(folder, "probe").unlink()
    except OSError:
        pass
for path in ("/etc/pg_exports/environment", "/proc/1/environ", "/var/lib/pg_exports/dagster.yaml"):
    try:
        pathlib.Path(path).read_text()
        print("reads", path)
    except OSError:
        pass
"""
"""Says what its user can do of what should be root's alone, and of what it must be able to."""


@pytest.mark.slow
@needs_namespaces
def test_the_service_s_user_can_change_no_code_and_read_no_secret_s_file(host: Host) -> None:
    said = host.as_service("python", "-c", PROBE)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [
        "no root",
        "writes in /var/lib/pg_exports/storage",
        "writes in /tmp",
        "reads /var/lib/pg_exports/dagster.yaml",
    ]
    # So it is without systemd's help, too.
    said = host.machine.run("runuser", "-u", "dagster", "--", f"{CODE}/.venv/bin/python", "-c", PROBE)
    assert set(said.stdout.splitlines()) == {
        "no root",
        "writes in /var/lib/pg_exports/storage",
        "writes in /tmp",
        "reads /var/lib/pg_exports/dagster.yaml",
    }


@pytest.mark.slow
@needs_namespaces
def test_other_commands_run_as_the_services_do_and_their_exit_status_is_given(host: Host) -> None:
    assert "All definitions loaded successfully" in host.as_service("dg", "check", "defs").stdout
    said = host.as_service(
        "python", "-c", "import os; print(os.environ['DAGSTER_DISABLE_TELEMETRY']); raise SystemExit(3)"
    )
    assert (said.returncode, said.stdout) == (3, "1\n")


@pytest.mark.slow
@needs_namespaces
def test_the_services_start_as_that_user_and_run_an_export(host: Host, public: None, hour: datetime) -> None:
    processes = [line.split() for line in host.machine.run("ps", "-eo", "user:20,args").stdout.splitlines()]
    assert {user for user, program, *_ in processes if program.startswith(CODE)} == {"dagster"}
    assert host.as_service("dagster-daemon", "liveness-check").stdout == "Daemon live\n"
    host.source.insert("events", *(event(hour) for _ in range(ROWS)))
    host.web.wait(host.web.backfill("events", [partition_key(hour)]))
    assert Target(host.source.sandbox, "public").count("events") == ROWS
    assert host.machine.shell("ls /var/lib/pg_exports").split() == ["dagster.yaml", "storage"]


@pytest.mark.slow
@needs_namespaces
def test_a_worker_runs_an_export_for_them(cluster_host: Host, public: None, hour: datetime) -> None:
    machine, web = cluster_host.machine, cluster_host.web
    cluster_host.source.insert("events", *(event(hour) for _ in range(ROWS)))
    web.wait(web.backfill("events", [partition_key(hour)]))
    assert Target(cluster_host.source.sandbox, "public").count("events") == ROWS
    app = ("celery", "--app", "dagster_celery.app", "--workdir", "deploy/celery")
    # The worker itself says what it has run: the journal of a busy machine lags behind.
    stats = cluster_host.as_service(*app, "inspect", "stats")
    assert "1 node online" in stats.stdout, stats.stdout + stats.stderr
    assert re.search(r'"execute_job": [1-9]', stats.stdout), stats.stdout + machine.log("pg-exports-worker")
    assert machine.shell("ls /var/lib/pg_exports").split() == ["dagster.yaml", "storage"]


@pytest.mark.slow
@needs_namespaces
def test_a_unit_does_not_start_where_the_restrictions_are_not_installed(host: Host) -> None:
    folder = "/etc/systemd/system/pg-exports-.service.d"
    host.machine.shell(f"mv {folder} /root/aside; systemctl daemon-reload; systemctl stop pg-exports-webserver")
    try:
        refused = host.machine.run("systemctl", "start", "pg-exports-webserver", check=False)
        assert refused.returncode == 1
        assert "Assertion failed" in refused.stderr
    finally:
        host.machine.shell(f"mv /root/aside {folder}; systemctl daemon-reload; systemctl start pg-exports-webserver")
