"""Warns of an interval that has far fewer or far more rows than the export's own recent ones."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from math import ceil, sqrt

import dagster as dg

from pg_exports.interval import SAMPLE, Findings, Interval

NAME = "volume"

DAYS = 7
"""An interval of less than a day is compared with those at the same time of so many days before it."""

INTERVALS = 8
"""A day or a week is compared with so many before it."""

ENOUGH = 3
"""Of fewer there is no telling what is usual."""

_DAY = timedelta(days=1)

_Rows = Mapping[tuple[datetime, datetime], int]


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset."""
    return dg.AssetCheckSpec(
        NAME,
        asset=export,
        description="Each interval has about as many rows at the source as the export's recent ones: those at the same time "
        f"of the {DAYS} days before it, or the {INTERVALS} days or weeks before it.",
    )


def history(interval: Interval) -> timedelta:
    """How long before an interval those begin that it is compared with."""
    length = interval.end - interval.start
    return DAYS * _DAY if length < _DAY / 2 else INTERVALS * length + _DAY


def result(findings: Findings, export: str) -> dg.AssetCheckResult:
    """The intervals that are out of the ordinary, with their rows and the bounds of what is usual."""
    ordered = sorted(findings.history)
    unusual: dict[str, dict[str, int]] = {}
    compared = 0
    for interval, counts in findings.written.items():
        before = _comparable(interval, findings.history, ordered)
        if len(before) < ENOUGH:
            continue
        compared += 1
        least, most = usual(before)
        if not least <= counts.at_source <= most:
            unusual[interval.partition_key] = {"rows": counts.at_source, "at_least": least, "at_most": most}
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not unusual,
        severity=dg.AssetCheckSeverity.WARN,
        description=_said(unusual) if unusual else None,
        metadata={
            "rows_at_source": sum(counts.at_source for counts in findings.written.values()),
            "intervals_compared": compared,
            "unusual_intervals": dict(list(unusual.items())[:SAMPLE]),
        },
    )


def usual(before: Sequence[int]) -> tuple[int, int]:
    """The bounds of what is usual after intervals with so many rows: half of the least to twice the most, with room for
    chance (three times the square root).
    """
    least, most = min(before), max(before)
    return max(0, ceil((least - 3 * sqrt(least)) / 2)), round(2 * (most + 3 * sqrt(most) + 5))


def _comparable(interval: Interval, history: _Rows, ordered: Sequence[tuple[datetime, datetime]]) -> list[int]:
    length = interval.end - interval.start
    if length < _DAY / 2:
        bounds = [(interval.start - days * _DAY, interval.end - days * _DAY) for days in range(1, DAYS + 1)]
        return [history[some] for some in bounds if some in history]
    earlier = reversed(ordered[: bisect_left(ordered, (interval.start, interval.start))])
    # Where clocks change, days and weeks have an hour more or less.
    alike = (some for some in earlier if abs((some[1] - some[0]) - length) <= timedelta(hours=2))
    return [history[some] for some in islice(alike, INTERVALS)]


def _said(unusual: Mapping[str, Mapping[str, int]]) -> str:
    [(key, first), *others] = unusual.items()
    more = f", and {len(others)} other intervals are unusual too" if others else ""
    return (
        f"{key} has {first['rows']:,} rows; {first['at_least']:,} to {first['at_most']:,} are usual{more}. Are events lost on "
        "their way into ClickHouse, or sent twice? If all is well, there is nothing to do."
    )
