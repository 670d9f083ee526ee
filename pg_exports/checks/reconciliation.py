"""The check in an export's own step: every row that the source had for an interval is in Postgres, or was set aside.

Rows that were written are counted: those that COPY took, and those that a merge inserted or updated. Unchanged rows are those
that a merge found in the table (in a version not older), and those that an earlier run has recorded: the table is not asked
for these. `make verify` counts them in the table.
"""

from collections.abc import Mapping

import dagster as dg

from pg_exports.interval import Findings

NAME = "reconciliation"


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset. It blocks: what is downstream does not run on an interval that lacks rows."""
    return dg.AssetCheckSpec(
        NAME,
        asset=export,
        description="Every row that ClickHouse had for the run's intervals was written, found or recorded, or is rejected.",
        blocking=True,
    )


def result(findings: Findings, export: str) -> dg.AssetCheckResult:
    """What the check says of a run's intervals: the rows on both sides, and the intervals that lack some."""
    written = findings.written
    at_source = sum(counts.at_source for counts in written.values())
    rejected = sum(counts.rejected for counts in written.values())
    there = {interval: counts.inserted + counts.updated + counts.unchanged for interval, counts in written.items()}
    lacking = {
        interval.partition_key: counts.at_source - there[interval] - counts.rejected
        for interval, counts in written.items()
        if there[interval] + counts.rejected != counts.at_source
    }
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not lacking,
        severity=dg.AssetCheckSeverity.ERROR,
        description=None if not lacking else _remedy(lacking),
        metadata={
            "rows_at_source": at_source,
            "rows_written": sum(counts.inserted + counts.updated for counts in written.values()),
            "rows_unchanged": sum(counts.unchanged for counts in written.values()),
            "rows_rejected": rejected,
            "failing_intervals": lacking,
        },
    )


def _remedy(lacking: Mapping[str, int]) -> str:
    return (
        f"{sum(lacking.values())} rows did not stay in the table, of the intervals {', '.join(lacking)}. Does a trigger of "
        "the table drop or change rows? Fix the trigger, then run the intervals again: only the missing rows are sent. "
        "Rows that the trigger let in under another key (uuid, distinct_id and so on) stay: delete those by hand."
    )
