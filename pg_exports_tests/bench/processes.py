"""A command run as a process of its own, and what it cost: time, memory, and CPU on both sides of the wire.

The figures come from Linux's /proc, before, during and after the run. What the commands do is none of this module's
business; what is made of the figures is in `peers` and beside it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from pg_exports.sandbox import Sandbox

SECONDS_BETWEEN_SAMPLES = 0.02
"""Of the memory of a process that has others below it; of one alone the kernel keeps the peak."""

LINES_SHOWN = 15
"""Of the output of a command that failed."""

PATIENCE = 3600
"""Seconds after which a command hangs, and is ended."""

ROOT = Path(__file__).parents[2]
"""The repository."""

_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A command failed, or a figure cannot be had; the message has the end of the command's output."""


@dataclass(frozen=True)
class Usage:
    """What a process cost.

    Attributes:
        seconds: from its start to its end, imports included.
        peak_bytes: the most memory that it and the processes below it held at one moment.
        client_cpu: seconds of CPU of it and those below it.
        postgres_cpu, clickhouse_cpu: seconds of CPU of the servers' processes meanwhile.
        output: what it wrote to stdout.
    """

    seconds: float
    peak_bytes: int
    client_cpu: float
    postgres_cpu: float
    clickhouse_cpu: float
    output: str


def run(
    command: Sequence[str], sandbox: Sandbox, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Usage:
    """Run a command to its end.

    Args:
        command: program and arguments.
        sandbox: whose servers it works with; the command gets the sandbox's environment.
        environment: variables beside those and this process's own.
        folder: the command's current folder; the sandbox's by default, where no project's settings are.

    Raises:
        BenchError: it ended with another status than 0.
    """
    variables = {**os.environ, **sandbox.environment(), **(environment or {})}
    postgres, clickhouse = _postgres_cpu(sandbox), _cpu(sandbox.clickhouse.pid)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=folder or sandbox.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        with _Peak(process.pid) as peak, _ended_at_last(process):
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complained = (_without_secrets(_text_of(file), sandbox) for file in (output, errors))
    if process.returncode:
        lines = f"{said}\n{complained}".strip().splitlines()[-LINES_SHOWN:]
        raise BenchError("\n".join([f"{' '.join(command[1:])} ended with {process.returncode}:", *lines]))
    return Usage(
        seconds=seconds,
        peak_bytes=peak.bytes,
        client_cpu=usage.ru_utime + usage.ru_stime,
        postgres_cpu=_postgres_cpu(sandbox) - postgres,
        clickhouse_cpu=_cpu(sandbox.clickhouse.pid) - clickhouse,
        output=said,
    )


def _text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _without_secrets(text: str, sandbox: Sandbox) -> str:
    """A failure is shown in public: without passwords, and without this machine's folders."""
    for secret in (sandbox.password, sandbox.instance_password, sandbox.source_password):
        text = text.replace(quote(secret, safe=""), "***").replace(secret, "***")
    for folder, name in ((sandbox.folder, "<sandbox>"), (sys.prefix, "<venv>"), (ROOT, "<repository>")):
        text = text.replace(str(folder), name)
    return text


@contextlib.contextmanager
def _ended_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process that hangs, and one that nobody waits for any more."""
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


class _Peak:
    """The most memory of a process and those below it, sampled by a thread. `ru_maxrss` would begin with the parent's."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SAMPLES):
            pids = [self._pid, *_below(self._pid)]
            together = sum(_memory(pid, "VmRSS") for pid in pids)
            self.bytes = max(self.bytes, together, *(_memory(pid, "VmHWM") for pid in pids))


def _below(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    for thread in _entries(Path(f"/proc/{pid}/task")):
        for child in _read(thread / "children").split():
            yield int(child)
            yield from _below(int(child))


def _memory(pid: int, name: str) -> int:
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _postgres_cpu(sandbox: Sandbox) -> float:
    """Seconds of the postmaster, of the processes that it has, and of those that have ended."""
    postmaster = int((sandbox.postgres.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
    while True:
        before = list(_below(postmaster))
        seconds = _cpu(postmaster) + sum(_cpu(pid) for pid in before)
        # One that ended meanwhile would count twice, or not at all.
        if list(_below(postmaster)) == before:
            return seconds


def _cpu(pid: int) -> float:
    """Seconds of a process and of those below it that have ended; 0 where it is gone."""
    # utime, stime, cutime, cstime; the program's name before them may hold spaces.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2].split()[11:15]
    return sum(int(ticks) for ticks in fields) / _TICKS


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
