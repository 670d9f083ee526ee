"""Warns of columns that an export would create and the table has not, and lists those that may be added."""

import dagster as dg

from pg_exports.interval import Findings

NAME = "table_columns"


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset."""
    return dg.AssetCheckSpec(
        NAME, asset=export, description="The table has every column that the export would create it with."
    )


def result(findings: Findings, export: str) -> dg.AssetCheckResult:
    """The columns that the table lacks, with the ALTER TABLE of each. Optional ones are listed, and no reason to warn."""
    lacking = findings.lacking
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not lacking,
        severity=dg.AssetCheckSeverity.WARN,
        description=(
            f"The table lacks {', '.join(lacking)}: these values are not exported. Run as its owner, and later rows have "
            f"them: {' '.join(lacking.values())} Or leave the columns out, in the export's `columns`."
            if lacking
            else None
        ),
        metadata={"lacking": dict(lacking), "may_be_added": dict(findings.lacking_optional)},
    )
