"""Intervals, and what an export's asset hands to its IO manager: the frames of each interval, opened one at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import polars as pl

from pg_exports.models import Model


@dataclass(frozen=True)
class Interval:
    """`[start, end)` of one partition, in UTC, on the time of insertion into ClickHouse."""

    partition_key: str
    start: datetime
    end: datetime

    def __str__(self) -> str:
        return f"[{self.start:%Y-%m-%d %H:%M}, {self.end:%Y-%m-%d %H:%M}) UTC"


OnBadRows = Literal["repair", "reject", "fail"]
"""Rows that Postgres cannot hold are repaired where that is faithful and else rejected, or all rejected, or fail the run."""

Deduplicate = Literal["interval", "table"]
"""An appended row that the source has in two intervals lands in each of them, or once in the whole table."""


@dataclass(frozen=True)
class IntervalFrames:
    """What an export's asset returns: its intervals, oldest first, and how to read one of them.

    It is no generator (Dagster would iterate it as events), and nothing is read before `read` is entered. `read` gives
    frames with the model's columns; it raises where an interval cannot be read to its end. `sql` is the query of an
    interval, to be pasted into a console. `on_bad_rows` says what becomes of rows that Postgres cannot
    hold, `deduplicate` whether an appended row may land once in each interval or once in the whole table.
    """

    export: str
    model: Model
    team_id: int
    intervals: tuple[Interval, ...]
    read: Callable[[Interval], AbstractContextManager[Iterator[pl.DataFrame]]]
    sql: Callable[[Interval], str]
    on_bad_rows: OnBadRows
    deduplicate: Deduplicate
