"""The units of `deploy/systemd` and `deploy/celery`: as systemd reads them, and the services that it starts from them.

The machine on which they start is set up by the commands of docs/set-up.md.
"""

import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from pg_exports.sandbox import Sandbox, source_tables
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
    folder = tmp_path_factory.mktemp("machine")
    over = folder / "over"
    web = Deployment(folder, free_port())
    source = Source(sandbox, f"test_{uuid.uuid4().hex[:12]}")
    source_tables.create_tables(sandbox.execute, source.database)
    lay(
        over, sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database}, sandbox.certificates.authority, web.port
    )
    with machine(folder, over, {Path(sys.base_prefix): "/opt/python", packages(): "/opt/packages"}) as running:
        try:
            set_up(running)
            eventually(lambda: answers_queries(web), PATIENCE)
            eventually(lambda: has_healthy_daemons(web), PATIENCE)
            yield Host(running, web, source)
        except AssertionError:
            for unit in ("pg-exports-daemon", "pg-exports-webserver"):
                sys.stderr.write(running.log(unit))
            raise
    sandbox.execute(f"DROP DATABASE {source.database} SYNC")


def packages() -> Path:
    return Path(pytest.__file__).parent.parent


def lay(over: Path, environment: Mapping[str, str], authority: Path, port: int) -> None:
    """What the machine has before its set-up: the repository with its `.venv`, and the variables that are to be typed in."""
    code = over / CODE[1:]
    code.mkdir(parents=True)
    copy_repository(code)
    lay_environment(code / ".venv")
    (over / "etc" / "ssl").mkdir(parents=True)
    shutil.copy(authority, over / "etc" / "ssl" / "sandbox.crt")
    variables = {name: value.replace(str(authority), "/etc/ssl/sandbox.crt") for name, value in environment.items()}
    # Python's library is looked for in the folder for which it was built, and that may be a home.
    variables["LD_LIBRARY_PATH"] = "/opt/python/lib"
    (over / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    own = over / "etc" / "systemd" / "system" / "pg-exports-webserver.service.d"
    own.mkdir(parents=True)
    # This machine's network is the other one's, too, and someone else may have the port.
    command = re.findall(r"ExecStart=(.+)", (REPOSITORY / "deploy/systemd/pg-exports-webserver.service").read_text())[0]
    (own / "port.conf").write_text(f"[Service]\nExecStart=\nExecStart={command.replace('3000', str(port))}\n")


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


def set_up(running: Machine) -> None:
    """The commands of docs/set-up.md, the second step of its section Production."""
    production = (REPOSITORY / "docs" / "set-up.md").read_text().partition("## Production")[2]
    [commands] = [block for block in re.findall(r"```sh\n(.+?)```", production, re.DOTALL) if "useradd" in block]
    running.shell(f"cd {CODE}\nexport EDITOR='cp /variables'\n{commands}")


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
def test_a_unit_does_not_start_where_the_restrictions_are_not_installed(host: Host) -> None:
    folder = "/etc/systemd/system/pg-exports-.service.d"
    host.machine.shell(f"mv {folder} /root/aside; systemctl daemon-reload; systemctl stop pg-exports-webserver")
    try:
        refused = host.machine.run("systemctl", "start", "pg-exports-webserver", check=False)
        assert refused.returncode == 1
        assert "Assertion failed" in refused.stderr
    finally:
        host.machine.shell(f"mv /root/aside {folder}; systemctl daemon-reload; systemctl start pg-exports-webserver")
