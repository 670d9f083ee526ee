"""The check that names intervals that are missing, and the backfill that brings them."""

import re
from datetime import datetime

import dagster as dg

from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of


def test_intervals_that_follow_each_other_pass(target: Target, run: RunExport, hour: datetime) -> None:
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour - 2 * HOUR), partition_key(hour - HOUR)).checks["gaps"].passed
    assert run(export, partition_key(hour)).checks["gaps"].passed


def test_after_a_pause_the_next_run_offers_the_gap_and_its_backfill_closes_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour - hours * HOUR) for hours in range(6)))
    export = export_of("events", target, hour)
    run(export, partition_key(hour - 5 * HOUR))
    resumed = run(export, partition_key(hour))
    assert resumed.error is None
    evaluation = resumed.checks["gaps"]
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    first, last = partition_key(hour - 4 * HOUR), partition_key(hour - HOUR)
    assert evaluation.metadata["missing"].value == [f"{first}...{last}"]
    assert f"`make backfill EXPORT=events FROM={first} TO={last}`" in str(evaluation.description)

    closed = run(export, first, last)
    assert closed.counts == (4, 0, 0)
    assert closed.checks["gaps"].passed
    assert target.count("events") == 6


def test_an_interval_that_is_in_the_table_in_part_is_a_gap(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    """As a run with several streams leaves it that ends between two commits."""
    source.insert("events", *(event(hour - hours * HOUR) for hours in range(3)))
    export = export_of("events", target, hour)
    run(export, partition_key(hour - 2 * HOUR), partition_key(hour - HOUR))
    target.execute(f"UPDATE pg_exports_ledger SET rows_missing = 1 WHERE interval_start = '{hour - HOUR}'")
    key = partition_key(hour - HOUR)
    evaluation = run(export, partition_key(hour)).checks["gaps"]
    assert not evaluation.passed
    assert evaluation.metadata["missing"].value == [f"{key}...{key}"]


def test_every_gap_is_listed_the_oldest_first(target: Target, run: RunExport, hour: datetime) -> None:
    export = export_of("events", target, hour)
    for hours in (6, 4, 2):
        done = run(export, partition_key(hour - hours * HOUR))
    evaluation = done.checks["gaps"]
    keys = [partition_key(hour - hours * HOUR) for hours in (5, 3)]
    assert evaluation.metadata["missing"].value == [f"{key}...{key}" for key in keys]
    assert " and 1 more" in str(evaluation.description)


def test_a_gap_over_a_change_of_clocks_has_the_keys_of_the_local_days(target: Target, run: RunExport) -> None:
    export = export_of(
        "events", target, datetime(2026, 1, 1), interval="day", timezone="Europe/Berlin", start="2026-10-01"
    )
    run(export, "2026-10-23")
    said = str(run(export, "2026-10-28").checks["gaps"].description)
    assert re.findall(r"FROM=(\S+) TO=(\S+)`", said) == [("2026-10-24", "2026-10-27")]


def test_what_was_exported_by_another_length_of_interval_is_no_gap(
    target: Target, run: RunExport, hour: datetime
) -> None:
    run(export_of("events", target, hour, interval="every 15 minutes"), partition_key(hour - HOUR))
    quarters = [partition_key(hour - HOUR)[:-2] + minutes for minutes in ("00", "45")]
    assert run(export_of("events", target, hour, interval="every 15 minutes"), *quarters).checks["gaps"].passed
    assert run(export_of("events", target, hour), partition_key(hour)).checks["gaps"].passed
