"""How far a long transaction has come, in the log: now and then, not for each piece."""

import logging
import threading
import time
from collections.abc import Callable

from pg_exports.errors import PassingError, SourceError

EVERY = 30.0
"""Seconds between two lines. What takes less has none."""


class Progress:
    """Says how many of the rows have been dealt with, how many a second, and about how long the others will take.

    Args:
        what: export and interval.
        count: gives the number of rows that there are; it is asked for when the first line is due.
        log: where to say it.
    """

    def __init__(self, what: str, count: Callable[[], int], log: logging.Logger) -> None:
        self._what, self._count, self._log = what, count, log
        self._began = self._said = time.monotonic()
        self._total: int | None = None
        self._rows: dict[int, int] = {}
        self._saying = threading.Lock()

    def tell(self, rows: int, part: int = 0) -> None:
        """So many rows of a part have been dealt with. Any thread may say so."""
        self._rows[part] = rows
        if time.monotonic() - self._said < EVERY or not self._saying.acquire(blocking=False):
            return
        try:
            self._say(sum(self._rows.values()))
        finally:
            self._saying.release()

    def _say(self, rows: int) -> None:
        if self._total is None:
            self._total = self._counted()
        now = time.monotonic()
        rate = rows / (now - self._began)
        of, left = "", ""
        if self._total:
            of = f" of {max(rows, self._total):,}"
            left = f", about {max(0, self._total - rows) / max(rate, 1):,.0f} s left"
        self._log.info(f"{self._what}: {rows:,}{of} rows, {rate:,.0f} rows/s{left}")
        self._said = now

    def _counted(self) -> int:
        """The number of rows that there are; 0 where it is not to be had, which is no reason to end a run that works."""
        try:
            return self._count()
        except (SourceError, PassingError) as error:
            self._log.info(f"{self._what}: how many rows there are was not to be found out. {error}")
            return 0

    def merging(self) -> None:
        """All rows are in the staging table."""
        if self._total is not None:
            self._log.info(f"{self._what}: all rows are in the staging table; they are merged now.")
