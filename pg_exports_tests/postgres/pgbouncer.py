"""A PgBouncer in transaction mode in front of a sandbox's Postgres: its configuration, its process, its end.

It speaks TLS on both sides with the sandbox's certificates, and runs as another user than root, which it refuses.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import ROLE

START_TIMEOUT = 10.0
"""Seconds for it to listen."""


@dataclass(frozen=True)
class PgBouncer:
    """A running one: where clients connect, its process, and the log of what it refused."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def pgbouncer(
    sandbox: Sandbox, *, pool_size: int, settings: Mapping[str, object] | None = None, port: int | None = None
) -> Iterator[PgBouncer]:
    """A PgBouncer for as long as the block lasts.

    Args:
        sandbox: whose Postgres, role and certificates it uses. Clients must connect over TLS.
        pool_size: how many connections it makes to the server for the role in one database.
        settings: further lines of its configuration.
        port: where it listens; a free port if it is not given.

    Raises:
        RuntimeError: it is not installed, or does not start; with its log.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise RuntimeError(
            "PgBouncer is not installed. Install it: `apt-get install pgbouncer` on Debian and Ubuntu (`make test` does "
            "so), `brew install pgbouncer` on macOS."
        )
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    # A TMPDIR of root's own may be closed to another user.
    with tempfile.TemporaryDirectory(prefix="pg_exports_pgbouncer_", dir="/tmp" if owner else None) as name:
        folder, port = Path(name), port or _free_port()
        _configure(folder, sandbox, port, pool_size, settings or {})
        if owner:
            for path in (folder, *folder.iterdir()):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        process = subprocess.Popen(
            [program, str(folder / "pgbouncer.ini")],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=owner.pw_uid if owner else None,
            group=owner.pw_gid if owner else None,
            extra_groups=[] if owner else None,
        )
        try:
            _wait_until_it_listens(process, port, folder / "log")
            yield PgBouncer(port, process, folder / "log")
        finally:
            process.kill()
            process.wait()


def _configure(folder: Path, sandbox: Sandbox, port: int, pool_size: int, changes: Mapping[str, object]) -> None:
    certificates = sandbox.certificates
    for source in (certificates.authority, certificates.certificate, certificates.key):
        shutil.copy(source, folder / source.name)
    (folder / "users").write_text(f'"{ROLE}" "{sandbox.password}"\n')
    (folder / "users").chmod(0o600)
    settings: dict[str, object] = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "logfile": folder / "log",
        "auth_type": "scram-sha-256",
        "auth_file": folder / "users",
        "pool_mode": "transaction",
        "default_pool_size": pool_size,
        "client_tls_sslmode": "require",
        "client_tls_cert_file": folder / certificates.certificate.name,
        "client_tls_key_file": folder / certificates.key.name,
        "server_tls_sslmode": "verify-ca",
        "server_tls_ca_file": folder / certificates.authority.name,
    }
    lines = [f"{name} = {value}\n" for name, value in (settings | dict(changes)).items()]
    upstream = f"* = host={HOST} port={sandbox.postgres.port}\n"
    (folder / "pgbouncer.ini").write_text("".join(["[databases]\n", upstream, "[pgbouncer]\n", *lines]))


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text() if log.exists() else ""
            raise RuntimeError(f"PgBouncer does not listen on port {port}:\n{said}")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
