"""The checks of an export's asset. They run in the step that writes, after the commit, on what it has found.

`reconciliation` alone blocks what is downstream; the others warn.
"""

from collections.abc import Iterator

import dagster as dg

from pg_exports.checks import bad_rows, erased_rows, gaps, reconciliation, table_columns, volume
from pg_exports.interval import IntervalFrames


def specs(export: str) -> list[dg.AssetCheckSpec]:
    """The checks of an export."""
    return [module.spec(export) for module in (bad_rows, table_columns, volume, gaps, erased_rows, reconciliation)]


def results(frames: IntervalFrames, partitions: dg.TimeWindowPartitionsDefinition) -> Iterator[dg.AssetCheckResult]:
    """What they say of a run. Reconciliation comes last: where it fails it ends the step."""
    # Each names its asset: Dagster else looks up twice which materialization it is of.
    findings, export = frames.findings, frames.export
    yield bad_rows.result(findings, export)
    yield table_columns.result(findings, export)
    yield volume.result(findings, export)
    yield gaps.result(findings, export, partitions)
    yield erased_rows.result(findings, export)
    yield reconciliation.result(findings, export)
