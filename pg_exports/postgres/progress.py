"""How far a long transaction has come, in the log: now and then, not for each piece."""

import logging
import time
from collections.abc import Callable

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

    def tell(self, rows: int) -> None:
        """So many rows have been dealt with."""
        if time.monotonic() - self._said < EVERY:
            return
        if self._total is None:
            self._total = self._count()
        now = time.monotonic()
        rate = rows / (now - self._began)
        left = max(0, self._total - rows)
        self._log.info(
            f"{self._what}: {rows:,} of {max(rows, self._total):,} rows, {rate:,.0f} rows/s, "
            f"about {left / max(rate, 1):,.0f} s left"
        )
        self._said = now

    def merging(self) -> None:
        """All rows are in the staging table."""
        if self._total is not None:
            self._log.info(f"{self._what}: all rows are in the staging table; they are merged now.")
