"""Intervals, what an export's asset hands to its IO manager, and what became of an interval's rows."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, field
from datetime import datetime
from typing import Literal

import polars as pl

from pg_exports.fingerprint import Fingerprint
from pg_exports.models import Model
from pg_exports.models.model import microseconds


@dataclass(frozen=True)
class Interval:
    """`[start, end)` of one partition, in UTC, on the time of insertion into ClickHouse."""

    partition_key: str
    start: datetime
    end: datetime

    @property
    def position(self) -> int:
        """`start` in microseconds since 1970, as the column `INTERVAL` has it."""
        return microseconds(self.start)

    def __str__(self) -> str:
        return f"[{self.start:%Y-%m-%d %H:%M}, {self.end:%Y-%m-%d %H:%M}) UTC"


def spanned(intervals: Sequence[Interval]) -> str:
    """Intervals that follow each other, for messages."""
    whole = Interval("", intervals[0].start, intervals[-1].end)
    return str(whole) if len(intervals) == 1 else f"{whole}, {len(intervals)} intervals"


OnBadRows = Literal["repair", "reject", "fail"]
"""Rows that Postgres cannot hold are repaired where that is faithful and else rejected, or all rejected, or fail the run."""

Deduplicate = Literal["interval", "table"]
"""An appended row that the source has in two intervals lands in each of them, or once in the whole table."""


@dataclass(frozen=True)
class Counts:
    """What became of an interval's rows, and their size as Arrow in bytes.

    Each row at the source was inserted, or replaced an older one (updated), or was there already (unchanged), or was
    rejected; if it is none of these, it is missing. Some of those that landed were repaired.
    """

    at_source: int
    inserted: int
    updated: int
    unchanged: int
    repaired: int
    rejected: int
    missing: int
    bytes: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        said = (
            f"{self.at_source} rows at the source, {self.inserted} inserted, {self.updated} updated, "
            f"{self.unchanged} unchanged, {self.repaired} repaired, {self.rejected} rejected"
        )
        return f"{said}, {self.missing} missing" if self.missing else said


@dataclass(frozen=True)
class IntervalFrames:
    """What an export's asset returns: its intervals, oldest first, and how to read some of them that follow each other.

    It is no generator (Dagster would iterate it as events), and nothing is read before `read` is entered.

    Attributes:
        export: the export's name.
        model, team_id: what is exported.
        intervals: oldest first.
        read: gives frames with the model's columns, of the optional ones those that are asked for, and `INTERVAL`; it
            raises where the intervals cannot be read to their end.
        fingerprints: gives those of intervals at the source now; None for a model whose rows are merged.
        sql: the query of an interval, to be pasted into a console.
        on_bad_rows: what becomes of rows that Postgres cannot hold.
        deduplicate: whether an appended row may land once in each interval or once in the whole table.
        replay: to ask the table itself which rows it lacks, instead of what earlier runs recorded.
        written: what became of each interval; the IO manager adds them.
    """

    export: str
    model: Model
    team_id: int
    intervals: tuple[Interval, ...]
    read: Callable[[Sequence[Interval], Collection[str]], AbstractContextManager[Iterator[pl.DataFrame]]]
    fingerprints: Callable[[Sequence[Interval]], list[Fingerprint]] | None
    sql: Callable[[Interval], str]
    on_bad_rows: OnBadRows
    deduplicate: Deduplicate
    replay: bool = False
    written: dict[Interval, Counts] = field(default_factory=dict)
