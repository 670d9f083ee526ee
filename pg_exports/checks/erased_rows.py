"""Warns of rows that were exported and are not at the source any more. They stay in Postgres: to delete them is their owner's.

A run finds them if it reads an interval again; a row that was erased is found once.
"""

import dagster as dg

from pg_exports.interval import SAMPLE, Findings

NAME = "erased_rows"


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset."""
    return dg.AssetCheckSpec(
        NAME,
        asset=export,
        description="Every row that earlier runs exported from the run's intervals is still in ClickHouse.",
    )


def result(findings: Findings, export: str) -> dg.AssetCheckResult:
    """The number of erased rows, in all and by interval."""
    erased = {interval.partition_key: counts.erased for interval, counts in findings.written.items() if counts.erased}
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not erased,
        severity=dg.AssetCheckSeverity.WARN,
        description=(
            f"{sum(erased.values())} rows that were exported earlier are not in ClickHouse any more, of the intervals "
            f"{', '.join(list(erased)[:SAMPLE])}. Were they erased, or sent again so that they count in another interval, or "
            "does the export select less than it did? They stay in Postgres. How their owner deletes them: "
            "docs/operations.md, Rows that were erased at the source."
            if erased
            else None
        ),
        metadata={"rows_erased": sum(erased.values()), "intervals": dict(list(erased.items())[:SAMPLE])},
    )
