"""Starts and stops the process that serves the sandbox's ClickHouse (`clickhouse_server`).

The process lives on by itself: its folder holds the data, the log (`server.log`) and where it listens (`ready.json`).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CREDENTIAL_VARIABLE = "PG_EXPORTS_SANDBOX_CLICKHOUSE_PASSWORD"
LOG_LINES_SHOWN = 30


class ClickHouseStartError(Exception):
    """The process ended, or said nothing, before it answered; the text holds the end of its log."""


@dataclass(frozen=True)
class ClickHouseServer:
    """A running server, and how to reach it. `https_port` is None when it has no certificate."""

    host: str
    http_port: int
    https_port: int | None
    user: str
    password: str = field(repr=False)
    folder: Path
    pid: int


def start(
    folder: Path, *, user: str, password: str, certificate: Path | None, key: Path | None, timeout: float = 60
) -> ClickHouseServer:
    """Start a server on `folder`, detached from this process, and wait up to `timeout` seconds until it answers.

    Raises ClickHouseStartError when it does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready, log = folder / "ready.json", folder / "server.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pg_exports.sandbox.clickhouse_server"]
    command += ["--folder", str(folder), "--user", user, "--ready", str(ready)]
    if certificate and key:
        command += ["--certificate", str(certificate), "--key", str(key)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, CREDENTIAL_VARIABLE: password},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    where = _wait_until_ready(process, ready, log, timeout)
    return ClickHouseServer(
        host="127.0.0.1",
        http_port=where["http_port"],
        https_port=where["https_port"],
        user=user,
        password=password,
        folder=folder,
        pid=process.pid,
    )


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Path, log: Path, timeout: float) -> dict[str, int]:
    deadline = time.monotonic() + timeout
    while not ready.exists():
        if process.poll() is not None:
            raise ClickHouseStartError(f"ClickHouse ended with status {process.returncode}.\n{_end_of(log)}")
        if time.monotonic() > deadline:
            process.kill()
            raise ClickHouseStartError(f"ClickHouse did not answer within {timeout} seconds.\n{_end_of(log)}")
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
