"""The checks of an export's asset. They run in the step that writes, after the commit, on what it has found.

`reconciliation` alone blocks what is downstream; the others warn.
"""

from collections.abc import Iterator

import dagster as dg

from pg_exports.checks import bad_rows, gaps, reconciliation, table_columns, volume
from pg_exports.interval import IntervalFrames


def specs(export: str) -> list[dg.AssetCheckSpec]:
    """The checks of an export."""
    return [module.spec(export) for module in (bad_rows, table_columns, volume, gaps, reconciliation)]


def results(frames: IntervalFrames, partitions: dg.TimeWindowPartitionsDefinition) -> Iterator[dg.AssetCheckResult]:
    """What they say of a run. Reconciliation comes last: where it fails it ends the step."""
    findings = frames.findings
    yield bad_rows.result(findings, frames.export)
    yield table_columns.result(findings)
    yield volume.result(findings)
    yield gaps.result(findings, frames.export, partitions)
    yield reconciliation.result(findings.written)
