"""What the soak exports: the three models and an own one of each kind, and how one of them is run in this process."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pg_exports import PostgresExport
from pg_exports.models import Model
from pg_exports_tests.conftest import TEAM, Run, Source, Target, materialise, partition_key
from pg_exports_tests.source_rows import HOUR, export_of

DAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)
"""The day whose intervals are exported, its first hours or all: the sensor of late rows looks at it."""

EMPTY = DAY - HOUR
"""An hour without rows: its run makes the tables, and has a table recognised that has changed."""

CLICKS: dict[str, Any] = {
    "name": "clicks",
    "query": "SELECT page, number, text, inserted_at FROM clicks"
    " WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"page": "TEXT", "number": "BIGINT", "text": "TEXT", "inserted_at": "TIMESTAMPTZ"},
    "key": ["page", "number"],
}
"""Appended, with a key of which a part may be NULL."""

VISITS: dict[str, Any] = {
    "name": "visits",
    "query": "SELECT id, distinct_id, state, at FROM visits"
    " WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"id": "BIGINT", "distinct_id": "TEXT", "state": "TEXT", "at": "TIMESTAMPTZ"},
    "key": ["id"],
    "version": ["at"],
}
"""Merged by a version."""

EXPORTS: Mapping[str, Any] = {
    "events": "events",
    "persons": "persons",
    "sessions": "sessions",
    "clicks": CLICKS,
    "visits": VISITS,
}
"""What each of the exports has as its `model`, by its name, which is its table's, too."""


@dataclass(frozen=True)
class Day:
    """What there is to export.

    Attributes:
        length: hours.
        events: in all of them.
        longest: the most intervals of a run.
    """

    length: int = 24
    events: int = 12_000
    longest: int = 6

    @property
    def hours(self) -> list[datetime]:
        """When each begins."""
        return [DAY + n * HOUR for n in range(self.length)]

    @property
    def end(self) -> datetime:
        return DAY + self.length * HOUR


@dataclass(frozen=True)
class Order:
    """What one run exports: the intervals from the first to the last."""

    export: str
    first: datetime
    last: datetime

    @property
    def intervals(self) -> int:
        return (self.last - self.first) // HOUR + 1

    def __str__(self) -> str:
        until = "" if self.first == self.last else f"-{self.last + HOUR:%H}"
        return f"{self.export} {self.first:%H}{until}"


@dataclass(frozen=True)
class Ways:
    """The ports at which a run finds the servers, and after how many seconds it takes them for frozen."""

    clickhouse: int
    postgres: int
    read_timeout: int

    @classmethod
    def direct(cls, target: Target) -> "Ways":
        """Without proxies between, and without haste."""
        sandbox = target.sandbox
        return cls(sandbox.clickhouse.https_port or 0, sandbox.postgres.port, read_timeout=60)


def export(which: str, target: Target, /, **changes: Any) -> PostgresExport:
    team = TEAM if isinstance(EXPORTS[which], str) else None
    return export_of(EXPORTS[which], target, DAY, **({"team_id": team, "late_rows_days": 60} | changes))


def model(name: str, target: Target) -> Model:
    return export(name, target).model_with_columns


def run(order: Order, source: Source, target: Target, ways: Ways, **changes: Any) -> Run:
    """Run an order in this process, without Dagster's log on the console."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return materialise(
            export(order.export, target, **changes),
            source.resource(port=ways.clickhouse, read_timeout=ways.read_timeout),
            target.resource(port=ways.postgres, read_timeout=ways.read_timeout),
            partition_key(order.first),
            partition_key(order.last),
        )


def replay(exported: str, hours: list[datetime], source: Source, target: Target, **changes: Any) -> None:
    """Run hours, each stretch of them in one run.

    Raises:
        AssertionError: a run failed.
    """
    for first, end in stretches(hours):
        done = run(Order(exported, first, end - HOUR), source, target, Ways.direct(target), **changes)
        assert done.error is None, done.error


def stretches(hours: list[datetime]) -> list[tuple[datetime, datetime]]:
    """Hours that follow each other, together: from when to when."""
    found: list[tuple[datetime, datetime]] = []
    for hour in hours:
        if found and found[-1][1] == hour:
            found[-1] = found[-1][0], hour + HOUR
        else:
            found.append((hour, hour + HOUR))
    return found
