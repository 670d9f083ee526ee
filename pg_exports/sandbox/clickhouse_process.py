"""Starts and stops the process that is the sandbox's ClickHouse (`clickhouse_server`).

The process lives on by itself: its folder holds the configuration, the data, the logs (`server.log` of the process and
`clickhouse.log` of the engine) and where it listens (`ready.json`).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pg_exports.sandbox import clickhouse_config
from pg_exports.sandbox.clickhouse_config import ClickHouseUser

LOG_LINES_SHOWN = 30


class ClickHouseStartError(Exception):
    """The process ended, or did not get ready in time; the text holds the end of its log."""


@dataclass(frozen=True)
class ClickHouseServer:
    """A running server, and how its administrator reaches it.

    Attributes:
        host: its address.
        http_port: of HTTP.
        https_port: of HTTPS; None if it has no certificate.
        tcp_port: of the native protocol; None if it is not served.
        user, password: the administrator's.
        folder: its files.
        pid: its process.
    """

    host: str
    http_port: int
    https_port: int | None
    tcp_port: int | None
    user: str
    password: str = field(repr=False)
    folder: Path
    pid: int


def start(
    folder: Path,
    *,
    password: str,
    users: Sequence[ClickHouseUser] = (),
    certificate: Path | None = None,
    key: Path | None = None,
    tcp_port: int | None = None,
    config: str = "",
    timeout: float = 60,
) -> ClickHouseServer:
    """Start a server on `folder`, detached from this process, and wait until it answers. Data in the folder is kept.

    Args:
        folder: of the server alone.
        password: the administrator's.
        users: further users.
        certificate: PEM file; with it HTTPS is served, too.
        key: PEM file of the certificate's key.
        tcp_port: of the native protocol, which is served only if it is given; see `free_port`.
        config: a further configuration file, such as one with `remote_servers`.
        timeout: seconds.

    Raises:
        ClickHouseStartError: it did not answer.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ready, log = folder / "ready.json", folder / "server.log"
    ready.unlink(missing_ok=True)
    clickhouse_config.write(folder, password, users, tcp_port=tcp_port, more=config)
    command = [
        sys.executable,
        str(Path(__file__).with_name("clickhouse_server.py")),
        "--folder",
        str(folder),
        "--ready",
        str(ready),
    ]
    if certificate and key:
        command += ["--certificate", str(certificate), "--key", str(key)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    ports = _wait_until_ready(process, ready, log, timeout)
    return ClickHouseServer(
        host=clickhouse_config.HOST,
        http_port=ports["http_port"],
        https_port=ports["https_port"],
        tcp_port=ports["tcp_port"],
        user=clickhouse_config.ADMINISTRATOR,
        password=password,
        folder=folder,
        pid=process.pid,
    )


def free_port() -> int:
    """A port on which nothing listens: servers of one cluster must know each other's before they start."""
    with socket.socket() as probe:
        probe.bind((clickhouse_config.HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Path, log: Path, timeout: float) -> dict[str, int]:
    deadline = time.monotonic() + timeout
    while not ready.exists():
        if process.poll() is not None:
            raise ClickHouseStartError(f"ClickHouse ended with status {process.returncode}.\n{_end_of(log)}")
        if time.monotonic() > deadline:
            process.kill()
            raise ClickHouseStartError(f"ClickHouse did not answer within {timeout:.0f} s.\n{_end_of(log)}")
        time.sleep(0.05)
    where: dict[str, int] = json.loads(ready.read_text())
    return where


def _end_of(log: Path) -> str:
    return "\n".join([f"The end of {log}:", *log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]])


def stop(server: ClickHouseServer, timeout: float = 10) -> None:
    """End the server: SIGTERM, and SIGKILL when it is still there after `timeout` seconds. No error when it is gone."""
    deadline = time.monotonic() + timeout
    number = signal.SIGTERM
    while _is_running(server):
        os.kill(server.pid, number)
        while _is_running(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        number = signal.SIGKILL


def _is_running(server: ClickHouseServer) -> bool:
    """Whether the process is there and ours: after a restart of the machine its number may be another's."""
    with contextlib.suppress(ChildProcessError):
        # A child that has ended stays as a zombie until it is waited for.
        ended, _ = os.waitpid(server.pid, os.WNOHANG)
        return ended == 0
    return str(server.folder) in _command_line(server.pid)


def _command_line(pid: int) -> str:
    """The arguments of a process, separated by something; nothing where there is no such process."""
    if Path("/proc/self/cmdline").exists():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return ""
    command = ["ps", "-p", str(pid), "-o", "args="]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
