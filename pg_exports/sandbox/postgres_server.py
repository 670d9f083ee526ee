"""A disposable PostgreSQL with TLS on: a cluster of its own in a folder of its own, on a free port.

It runs as the operating system's `postgres` user when the caller is root (PostgreSQL refuses root), else as the
caller. Any number may run side by side. Roles, databases and grants are made by the functions at the end; what goes
into the tables is none of this module's business.
"""

import contextlib
import getpass
import glob
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg2
import psycopg2.extras

from pg_exports.postgres.identifiers import literal, quoted
from pg_exports.sandbox.certificates import HOST, Certificates

SUPERUSER = "sandbox_admin"

CHOSEN = "PG_EXPORTS_POSTGRES"
"""The environment variable that names the folder with initdb and pg_ctl of another PostgreSQL than the newest one."""

START_TIMEOUT = 60.0
"""Seconds for a server to answer its first connection."""


class PostgresSandboxError(RuntimeError):
    """PostgreSQL's programs are missing, or its server did not start; the message has its log's last lines."""


@dataclass(frozen=True)
class PostgresServer:
    """A running cluster: where it listens, where its files are, and the folder of the programs that it was started with.
    The admin's socket is in `folder`.
    """

    host: str
    port: int
    folder: Path
    log: Path
    binaries: Path

    def admin_uri_of(self, database: str) -> str:
        """Connection string of the superuser, over the Unix socket in the cluster's private folder."""
        return f"host='{self.folder}' port={self.port} user={SUPERUSER} dbname='{database}'"

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the superuser, each in a transaction of its own."""
        with admin(self, database) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def rows(self, query: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Rows of a query as the superuser."""
        with admin(self, database) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return [tuple(row) for row in cursor.fetchall()]


@contextlib.contextmanager
def admin(server: PostgresServer, database: str = "postgres") -> Iterator[psycopg2.extensions.connection]:
    """An autocommit connection of the superuser; documents come as text.

    By psycopg2, which dagster-postgres brings: ADBC asks for all types and tables first, and takes ten times as long.
    """
    with contextlib.closing(psycopg2.connect(server.admin_uri_of(database))) as connection:
        connection.autocommit = True
        psycopg2.extras.register_default_json(connection, loads=str)
        psycopg2.extras.register_default_jsonb(connection, loads=str)
        yield connection


def start(certificates: Certificates | None, *, settings: dict[str, str] | None = None) -> PostgresServer:
    """Make and start a cluster. Without certificates it speaks no TLS. Durability is off: its data is disposable.

    Args:
        certificates: the server's certificate and key.
        settings: further lines for postgresql.conf.

    Raises:
        PostgresSandboxError: PostgreSQL is not installed, or the server did not come up.
    """
    binaries = find_binaries()
    owner = _owner()
    with _new_folder(binaries, owner) as folder:
        data = folder / "data"
        initdb: list[str | Path] = [binaries / "initdb", "-D", data, "-U", SUPERUSER, "--auth=trust", "--no-sync"]
        _run([*initdb, "-E", "UTF8", "--locale=C"], owner)
        return _start(binaries, folder, certificates, settings or {}, owner)


def start_standby(primary: PostgresServer, certificates: Certificates | None) -> PostgresServer:
    """Copy a running cluster, and start the copy as a read-only standby that follows it, on a port of its own.

    Args:
        primary: the cluster. Its roles, databases and rows are the standby's too.
        certificates: the standby's certificate and key.

    Raises:
        PostgresSandboxError: it cannot be copied, or the standby did not come up.
    """
    binaries = primary.binaries
    owner = _owner()
    follow = f"host={primary.folder} port={primary.port} user={SUPERUSER}"
    with _new_folder(binaries, owner) as folder:
        copy: list[str | Path] = [
            binaries / "pg_basebackup",
            "-d",
            follow,
            "-D",
            folder / "data",
            "--write-recovery-conf",
        ]
        _run([*copy, "--checkpoint=fast", "--no-sync"], owner)
        # `_configure` writes the file anew in which pg_basebackup has put this.
        return _start(binaries, folder, certificates, {"primary_conninfo": f"'{follow}'"}, owner)


@contextlib.contextmanager
def _new_folder(binaries: Path, owner: pwd.struct_passwd | None) -> Iterator[Path]:
    """A private folder of the server's user for a cluster; where the block fails, cluster and folder are gone."""
    # A TMPDIR of root's own may be closed to the server's user.
    folder = Path(tempfile.mkdtemp(prefix="pg_exports_postgres_", dir="/tmp" if owner else None))  # noqa: S108
    try:
        if owner:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        yield folder
    except BaseException:
        stop(PostgresServer(HOST, 0, folder, folder / "server.log", binaries))
        raise


def _start(
    binaries: Path,
    folder: Path,
    certificates: Certificates | None,
    settings: dict[str, str],
    owner: pwd.struct_passwd | None,
) -> PostgresServer:
    data, log = folder / "data", folder / "server.log"
    for _ in range(5):
        port = _free_port()
        _configure(data, folder, port, certificates, settings, owner)
        process = _run(
            [binaries / "pg_ctl", "start", "-D", data, "-l", log, "-w", "-t", str(int(START_TIMEOUT)), "-s"],
            owner,
            check=False,
        )
        if process.returncode == 0:
            return PostgresServer(HOST, port, folder, log, binaries)
        if "could not create any TCP/IP sockets" not in _tail(log):
            break
    raise PostgresSandboxError(f"PostgreSQL did not start in {folder}:\n{_tail(log)}{process.stderr}")


def restart(server: PostgresServer, mode: Literal["fast", "immediate"] = "fast") -> None:
    """Stop a cluster and start it again, where it was.

    Args:
        server: the cluster.
        mode: `fast` ends every session with a word and rolls its transaction back; `immediate` is a crash, which may lose
            what was just committed unless the cluster was started with `synchronous_commit` on.

    Raises:
        PostgresSandboxError: it did not come up again.
    """
    stop_and_start: list[str | Path] = [server.binaries / "pg_ctl", "restart", "-D", server.folder / "data", "-m", mode]
    _run([*stop_and_start, "-l", server.log, "-w", "-t", str(int(START_TIMEOUT)), "-s"], _owner())


def stop(server: PostgresServer) -> None:
    """Stop a cluster at once and delete its files."""
    data = server.folder / "data"
    if (data / "postmaster.pid").exists():
        _run([server.binaries / "pg_ctl", "stop", "-D", data, "-m", "immediate", "-s"], _owner(), check=False)
    shutil.rmtree(server.folder, ignore_errors=True)


def is_running(server: PostgresServer) -> bool:
    """Whether the cluster answers its superuser."""
    try:
        server.rows("SELECT 1")
    except psycopg2.Error:
        return False
    return True


def find_binaries() -> Path:
    """The folder with initdb and pg_ctl: the one that `PG_EXPORTS_POSTGRES` names; if it is not set, the newest under
    the usual folders of Debian, Red Hat and Homebrew, or PATH's.

    Raises:
        PostgresSandboxError: there is none.
    """
    chosen = os.environ.get(CHOSEN)
    if chosen:
        if not _has_programs(Path(chosen)):
            raise PostgresSandboxError(
                f"{CHOSEN} is {chosen}, a folder without PostgreSQL's programs initdb and pg_ctl."
            )
        return Path(chosen).absolute()
    patterns = (
        "/usr/lib/postgresql/*/bin",
        "/usr/pgsql-*/bin",
        "/opt/homebrew/opt/postgresql@*/bin",
        "/usr/local/opt/postgresql@*/bin",
    )
    folders = [Path(folder) for pattern in patterns for folder in glob.glob(pattern)]
    folders = [folder for folder in folders if _has_programs(folder)]
    if folders:
        return max(folders, key=_version_of)
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    raise PostgresSandboxError(
        "PostgreSQL's server programs (initdb, pg_ctl) were not found. Install them: "
        "`apt-get install postgresql` on Debian and Ubuntu, `brew install postgresql@17` on macOS."
    )


def create_role(server: PostgresServer, role: str, password: str) -> None:
    """A login role without any privilege of its own."""
    server.execute(
        # The server's log has every statement.
        "SET log_statement = 'none'",
        "SET log_min_error_statement = 'panic'",
        f"CREATE ROLE {quoted(role)} LOGIN NOINHERIT PASSWORD {literal(password)}",
    )


def create_database(server: PostgresServer, database: str, *, owner: str | None = None) -> None:
    """A database in which PUBLIC may do nothing, not even connect or make temporary tables."""
    server.execute(f"CREATE DATABASE {quoted(database)}" + (f" OWNER {quoted(owner)}" if owner else ""))
    server.execute(
        f"REVOKE ALL ON DATABASE {quoted(database)} FROM PUBLIC",
        "REVOKE ALL ON SCHEMA public FROM PUBLIC",
        database=database,
    )


def grant_export(server: PostgresServer, role: str, database: str, schema: str = "public") -> None:
    """The narrow grants of an export: connect, and use and create in one schema. Nothing else."""
    server.execute(f"GRANT CONNECT ON DATABASE {quoted(database)} TO {quoted(role)}")
    server.execute(
        f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}",
        f"GRANT USAGE, CREATE ON SCHEMA {quoted(schema)} TO {quoted(role)}",
        database=database,
    )


def new_password() -> str:
    """A random password."""
    return secrets.token_urlsafe(18)


def _configure(
    data: Path,
    folder: Path,
    port: int,
    certificates: Certificates | None,
    settings: dict[str, str],
    owner: pwd.struct_passwd | None,
) -> None:
    lines = {
        "listen_addresses": "'localhost'",
        "port": str(port),
        "unix_socket_directories": f"'{folder}'",
        "max_connections": "100",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "max_wal_size": "'4GB'",
        "log_statement": "'all'",
        # Bytes: a key journal's would be a megabyte of log each.
        "log_parameter_max_length": "1024",
        "log_line_prefix": "'%m [%p] %q%u@%d '",
        "timezone": "'UTC'",
    }
    if certificates:
        for source, name in ((certificates.certificate, "server.crt"), (certificates.key, "server.key")):
            target = data / name
            shutil.copyfile(source, target)
            target.chmod(0o600)
            if owner:
                os.chown(target, owner.pw_uid, owner.pw_gid)
        lines |= {"ssl": "on"}
    lines |= settings
    (data / "postgresql.auto.conf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
    network = "hostssl" if certificates else "host"
    everybody = "".join(f"{network} all all {address} scram-sha-256\n" for address in ("127.0.0.1/32", "::1/128"))
    (data / "pg_hba.conf").write_text(f"local all,replication {SUPERUSER} trust\n{everybody}")


def _owner() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise PostgresSandboxError("PostgreSQL refuses to run as root, and there is no user `postgres` to run it as.")


def _run(
    command: list[str | Path], owner: pwd.struct_passwd | None, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's programs as `owner`; its output goes to a file, as the server would hold a pipe open."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.run(
                [str(part) for part in command],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=owner.pw_uid if owner else None,
                group=owner.pw_gid if owner else None,
                extra_groups=[] if owner else None,
                start_new_session=True,
                check=False,
            )
        except PermissionError:
            raise PostgresSandboxError(
                f"{command[0]} cannot be run by the user `{owner.pw_name if owner else getpass.getuser()}`. "
                "Open this folder and those above it to all users: chmod o+rx"
            ) from None
        output.seek(0)
        said = output.read()
    if check and process.returncode:
        raise PostgresSandboxError(f"{Path(command[0]).name} failed:\n{said}")
    return subprocess.CompletedProcess(process.args, process.returncode, "", said)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    return "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]) if log.exists() else ""


def _has_programs(folder: Path) -> bool:
    return (folder / "initdb").exists() and (folder / "pg_ctl").exists()


def _version_of(folder: Path) -> tuple[int, ...]:
    digits = "".join(character if character.isdigit() else " " for character in str(folder)).split()
    return tuple(int(number) for number in digits)
