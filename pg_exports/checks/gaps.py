"""Warns of intervals that are missing between those that were exported, and says how to have them.

They are missing after a schedule was stopped for a while, and where a run has failed for good.
"""

from collections.abc import Sequence
from datetime import datetime

import dagster as dg

from pg_exports.interval import SAMPLE, Findings

NAME = "gaps"


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset."""
    return dg.AssetCheckSpec(
        NAME,
        asset=export,
        description="No interval of the last 90 days is missing between the first and the last one that were exported.",
    )


def result(findings: Findings, export: str, partitions: dg.TimeWindowPartitionsDefinition) -> dg.AssetCheckResult:
    """The gaps as ranges of partition keys, with the backfill of the first one."""
    ranges = [_keys(partitions, start, end) for start, end in findings.gaps]
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not ranges,
        severity=dg.AssetCheckSeverity.WARN,
        description=_said(ranges, export) if ranges else None,
        metadata={"gaps": len(ranges), "missing": [f"{first}...{last}" for first, last in ranges[:SAMPLE]]},
    )


def _keys(partitions: dg.TimeWindowPartitionsDefinition, start: datetime, end: datetime) -> tuple[str, str]:
    """The first and the last partition of a gap."""
    first = partitions.get_partition_key_for_timestamp(start.timestamp())
    before = partitions.get_prev_partition_window(end.astimezone(partitions.start.tzinfo), respect_bounds=False)
    last = partitions.get_partition_key_for_timestamp(before.start.timestamp()) if before else first
    return first, max(first, last)


def _said(ranges: Sequence[tuple[str, str]], export: str) -> str:
    [(first, last), *others] = ranges
    more = f" and {len(others)} more" if others else ""
    return (
        f"Nothing was exported of {first}...{last}{more}. To have it: `make backfill EXPORT={export} FROM={first} TO={last}`, "
        "once for each range. (In the UI, Materialize, Missing offers only what Dagster does not show as materialised.)"
    )
