"""Warns of columns that an export would create and the table has not, and lists those that may be added."""

from collections.abc import Mapping

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
        description=_remedy(lacking) if lacking else None,
        metadata={"lacking": dict(lacking), "may_be_added": dict(findings.lacking_optional)},
    )


def _remedy(lacking: Mapping[str, str]) -> str:
    parts = [f"The table lacks {', '.join(lacking)}: these values are not exported."]
    statements = " ".join(statement for statement in lacking.values() if statement)
    if statements:
        parts.append(f"Run as its owner, and later rows have them: {statements}")
    identity = [name for name, statement in lacking.items() if not statement]
    if identity:
        parts.append(
            f"The rows that are there would have no {', '.join(identity)}, by which rows are told apart. Set the "
            "export's `table` to another table, or to a name that is free."
        )
    if statements:
        parts.append("Or leave the columns out, in the export's `columns`.")
    return " ".join(parts)
