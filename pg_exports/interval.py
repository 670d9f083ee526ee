"""Intervals, what an export's asset hands to its IO manager, and what became of an interval's rows."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, field
from datetime import datetime, timedelta
from typing import Literal, Protocol

import polars as pl

from pg_exports.fingerprint import Fingerprint
from pg_exports.models import Model, Part
from pg_exports.models.model import WHOLE, microseconds


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

Deduplicate = Literal["interval", "table", "replace"]
"""An event that the source has in two intervals lands in each of them, or once in the whole table; then the first one that
lands stays, or the newest one replaces it.
"""


@dataclass(frozen=True)
class Counts:
    """What became of an interval's rows, and their size as Arrow in bytes.

    Each row at the source was inserted, or replaced an older one (updated), or was there already (unchanged), or was
    rejected; if it is none of these, it is missing. Some of those that landed were repaired. Rows that an earlier run has
    exported from the interval and the source does not have any more are erased.
    """

    at_source: int
    inserted: int
    updated: int
    unchanged: int
    repaired: int
    rejected: int
    missing: int
    bytes: int
    erased: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        said = (
            f"{self.at_source} rows at the source, {self.inserted} inserted, {self.updated} updated, "
            f"{self.unchanged} unchanged, {self.repaired} repaired, {self.rejected} rejected"
        )
        said = f"{said}, {self.missing} missing" if self.missing else said
        return f"{said}, {self.erased} erased at the source" if self.erased else said


@dataclass
class Seconds:
    """Where a transaction's time went: waiting for the source, making rows ready, COPY, and the merge. The first three
    overlap.
    """

    source: float = 0
    transform: float = 0
    copy: float = 0
    merge: float = 0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Source(Protocol):
    """Where an export's rows come from. All intervals that are asked for together follow each other."""

    @property
    def model(self) -> Model:
        """The export's model, without the columns that the source cannot fill as it is now."""
        ...

    def settle(self, last: Interval) -> None:
        """Wait until the interval has been over for a minute by the source's own clock.

        Raises:
            SettingsError: it is not over for a long time yet.
        """
        ...

    def read(
        self, intervals: Sequence[Interval], columns: Collection[str], part: Part = WHOLE
    ) -> AbstractContextManager[Iterator[pl.DataFrame]]:
        """Frames with the model's columns, of the optional ones those that are asked for, and `INTERVAL`. Nothing is read
        before the block is entered; it raises where the intervals cannot be read to their end. When the block ends early,
        whoever reads the frames in another thread is interrupted.
        """
        ...

    def fingerprints(self, intervals: Sequence[Interval]) -> list[Fingerprint]:
        """What each interval is at the source now."""
        ...

    def count(self, intervals: Sequence[Interval]) -> int:
        """How many rows `read` would give."""
        ...

    def sql(self, interval: Interval) -> str:
        """The query of an interval, to be pasted into a console."""
        ...

    def query_ids(self, interval: Interval) -> list[str]:
        """The queries that were sent for an interval so far, as ClickHouse's query log has them."""
        ...


SAMPLE = 10
"""How many rows, intervals or reasons are shown of those that a check finds."""


@dataclass(frozen=True)
class Example:
    """One of the rows that were rejected or repaired: when it counts, its key as JSON, the column at fault, and why."""

    interval: Interval
    key: str
    column: str | None
    reason: str


@dataclass
class Findings:
    """What a run has learned of its intervals and its table; its checks tell it.

    Attributes:
        written: what became of each interval.
        rejected: some of the rows that were set aside.
        repaired: by column, how many of its values were repaired.
        lacking: columns that the model could fill and the table lacks, each with the statement that adds it (empty if
            adding it would not help the rows that are there).
        lacking_optional: the same of columns that a user may add, and an export does not create.
        history: rows at the source of the export's intervals that are in the ledger, by their bounds, of the time before
            the run's intervals and of these.
        gaps: bounds of the time between the export's first and its last interval of which the ledger has none.
    """

    written: dict[Interval, Counts] = field(default_factory=dict)
    rejected: list[Example] = field(default_factory=list)
    repaired: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, str] = field(default_factory=dict)
    lacking_optional: dict[str, str] = field(default_factory=dict)
    history: dict[tuple[datetime, datetime], int] = field(default_factory=dict)
    gaps: list[tuple[datetime, datetime]] = field(default_factory=list)


@dataclass(frozen=True)
class IntervalFrames:
    """What an export's asset returns: its intervals, oldest first, and where their rows are.

    It is no generator (Dagster would iterate it as events).

    Attributes:
        export: the export's name.
        model, team_id: what is exported; 0 for a model without teams.
        intervals: oldest first.
        source: reads some of the intervals.
        on_bad_rows: what becomes of rows that Postgres cannot hold.
        deduplicate: whether an appended row may land once in each interval or once in the whole table.
        streams: connections over which one interval is read and copied, if its pool has so many.
        history: how long before the first interval the ledger is read, for what is usual.
        replay: to ask the table itself which rows it lacks, instead of what earlier runs recorded.
        findings: what the IO manager finds on the way.
    """

    export: str
    model: Model
    team_id: int
    intervals: tuple[Interval, ...]
    source: Source
    on_bad_rows: OnBadRows
    deduplicate: Deduplicate
    streams: int = 1
    history: timedelta = timedelta(0)
    replay: bool = False
    findings: Findings = field(default_factory=Findings)
