"""The soak's runs in processes of their own, and how each ended."""

import contextlib
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import dagster as dg

from pg_exports.postgres import ingest, io_manager, journal
from pg_exports_tests.conftest import Source, Target
from pg_exports_tests.soak.exports import Order, Ways, run

PATIENCE = 180
"""Seconds after which a run hangs."""

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class End:
    """How a run ended, after how many tries."""

    how: Literal["ok", "failed", "killed"]
    tries: int = 0
    error: str = ""

    def __str__(self) -> str:
        if self.how == "killed":
            return "killed"
        after = f" after {self.tries} tries" if self.tries > 1 else ""
        return f"{self.how}{after}" + (f": {self.error.splitlines()[0]}" if self.error else "")


class Process:
    """A run in a process of its own."""

    def __init__(self, order: Order, source: Source, target: Target, ways: Ways) -> None:
        self._order = order
        self._answer, theirs = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=_run_here, args=(order, source, target, ways, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._was_killed = False

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL: it can do nothing more, not even hang up in good order."""
        self._was_killed = True
        self._process.kill()

    def end(self) -> End:
        """Wait for its end.

        Raises:
            AssertionError: it hangs, it crashed, or it failed with an error that does not pass.
        """
        self._process.join(PATIENCE)
        assert not self.is_running, f"{self._order} hangs"
        with contextlib.suppress(EOFError):
            end: End = self._answer.recv()
            # One that does not pass is not tried again.
            assert end.how == "ok" or end.tries == 1 + io_manager.RETRIES.max_retries, f"{self._order}: {end.error}"
            return end
        assert self._was_killed, f"{self._order} ended with {self._process.exitcode}"
        return End("killed")


def _run_here(order: Order, source: Source, target: Target, ways: Ways, answer: Connection) -> None:
    """What the process does. Rows go in many small pieces, so that there is much between the first and the last."""
    ingest.COPY_BYTES, journal.PIECE = 20_000, 100
    io_manager.RETRIES = dg.RetryPolicy(
        max_retries=io_manager.RETRIES.max_retries, delay=0.2, backoff=dg.Backoff.EXPONENTIAL
    )
    done = run(order, source, target, ways)
    answer.send(End("failed" if done.error else "ok", done.tries, done.error or ""))
