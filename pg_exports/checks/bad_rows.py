"""Warns of rows that were set aside or repaired, with some of the reasons."""

import dagster as dg

from pg_exports.interval import SAMPLE, Findings

NAME = "bad_rows"


def spec(export: str) -> dg.AssetCheckSpec:
    """The check of an export's asset."""
    return dg.AssetCheckSpec(
        NAME, asset=export, description="No row of the run's intervals had to be set aside or repaired."
    )


def result(findings: Findings, export: str) -> dg.AssetCheckResult:
    """How many rows of the run's intervals there were, and up to `SAMPLE` of those that were set aside with their reasons."""
    rejected = sum(counts.rejected for counts in findings.written.values())
    repaired = sum(counts.repaired for counts in findings.written.values())
    columns = ("interval", "key", "column", "reason")
    examples = [
        dg.TableRecord(
            {"interval": str(row.interval), "key": row.key, "column": row.column or "", "reason": row.reason}
        )
        for row in findings.rejected[:SAMPLE]
    ]
    shown = (
        dg.TableMetadataValue(examples, dg.TableSchema([dg.TableColumn(name, "string") for name in columns]))
        if examples
        else None
    )
    return dg.AssetCheckResult(
        asset_key=export,
        check_name=NAME,
        passed=not (rejected or repaired),
        severity=dg.AssetCheckSeverity.WARN,
        description=_said(findings, export, rejected, repaired),
        metadata={
            "rows_rejected": rejected,
            "rows_repaired": repaired,
            "repaired_values": dict(findings.repaired),
            **({"rejected": shown} if shown else {}),
        },
    )


def _said(findings: Findings, export: str, rejected: int, repaired: int) -> str | None:
    sentences = []
    if rejected:
        reasons = dict.fromkeys(example.reason for example in findings.rejected)
        sentences.append(
            f"{rejected} rows were set aside. {' '.join(list(reasons)[:3])} They are kept in pg_exports_rejected: "
            f"SELECT * FROM pg_exports_rejected WHERE export = '{export}' AND resolved_at IS NULL;"
        )
    if repaired:
        columns = ", ".join(f"{column} ({count})" for column, count in findings.repaired.most_common())
        where = f", in the columns {columns}" if columns else ""
        sentences.append(
            f"{repaired} rows were repaired{where}: a NUL, half a surrogate pair or bytes that are no UTF-8 became U+FFFD."
        )
    return " ".join(sentences) or None
