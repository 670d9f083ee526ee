"""The check that warns of rows that were set aside or repaired."""

from datetime import datetime

import dagster as dg

from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of


def warning(run: Run) -> dg.AssetCheckEvaluation:
    """The evaluation of a check that warns, in a run that did not fail."""
    assert run.error is None
    evaluation = run.checks["bad_rows"]
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    return evaluation


def test_good_rows_pass(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    source.insert("events", event(hour))
    evaluation = run(export_of("events", target, hour), partition_key(hour)).checks["bad_rows"]
    assert evaluation.passed
    assert evaluation.metadata["rows_rejected"].value == evaluation.metadata["rows_repaired"].value == 0


def test_rows_that_were_set_aside_are_a_warning_with_some_of_them_and_their_reasons(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), *(event(hour, event="x" * 201) for _ in range(12)))
    evaluation = warning(run(export_of("events", target, hour), partition_key(hour)))
    assert evaluation.metadata["rows_rejected"].value == 12
    table = evaluation.metadata["rejected"]
    assert isinstance(table, dg.TableMetadataValue)
    examples = table.records
    assert len(examples) == 10
    assert {example.data["column"] for example in examples} == {"event"}
    assert all("TYPE TEXT" in str(example.data["reason"]) for example in examples)
    assert "12 rows were set aside" in str(evaluation.description)
    assert "WHERE export = 'events' AND resolved_at IS NULL" in str(evaluation.description)


def test_rows_that_were_repaired_are_a_warning_with_the_columns(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert(
        "events", event(hour), event(hour, properties='{"a": "\\u0000"}', distinct_id="\0"), event(hour, event="\0")
    )
    evaluation = warning(run(export_of("events", target, hour), partition_key(hour)))
    assert evaluation.metadata["rows_repaired"].value == 2
    assert evaluation.metadata["repaired_values"].value == {"event": 1, "properties": 1, "distinct_id": 1}
    assert "2 rows were repaired, in the columns" in str(evaluation.description)


def test_a_range_has_the_bad_rows_of_all_its_intervals(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour - HOUR, event="x" * 201), event(hour, event="\0"))
    evaluation = warning(run(export_of("events", target, hour), partition_key(hour - HOUR), partition_key(hour)))
    assert (evaluation.metadata["rows_rejected"].value, evaluation.metadata["rows_repaired"].value) == (1, 1)
