"""The check that compares an interval's rows with the export's recent ones."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import dagster as dg
import pytest

from pg_exports.checks.volume import usual
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of

DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("before", "rows", "is_usual"),
    [
        ([100, 120, 90], 100, True),
        ([100, 120, 90], 60, True),
        ([100, 120, 90], 25, False),
        ([100, 120, 90], 0, False),
        ([100, 120, 90], 240, True),
        ([100, 120, 90], 400, False),
        ([0, 0, 0], 0, True),
        ([0, 0, 0], 10, True),
        ([0, 0, 0], 11, False),
        ([3, 5, 1], 0, True),
        ([10, 12, 15], 0, False),
        ([1_000_000, 1_100_000], 400_000, False),
        ([1_000_000, 1_100_000], 600_000, True),
        ([5, 1_000], 0, True),
    ],
)
def test_usual_is_half_of_the_least_to_twice_the_most_with_room_for_chance(
    before: Sequence[int], rows: int, is_usual: bool
) -> None:
    least, most = usual(before)
    assert (least <= rows <= most) == is_usual


def test_an_hour_is_compared_with_the_same_hour_of_the_days_before_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    for days in (1, 2, 3):
        source.insert("events", *(event(hour - days * DAY) for _ in range(50)))
        # As at night: an hour that has few rows every day.
        source.insert("events", *(event(hour - HOUR - days * DAY) for _ in range(2)))
    source.insert("events", event(hour - HOUR), *(event(hour) for _ in range(9)))
    export = export_of("events", target, hour, start=hour - 5 * DAY)
    history = run(export, partition_key(hour - 3 * DAY - HOUR), partition_key(hour - 2 * HOUR))
    assert history.error is None
    assert history.checks["volume"].passed

    quiet = run(export, partition_key(hour - HOUR)).checks["volume"]
    assert quiet.passed
    assert quiet.metadata["intervals_compared"].value == 1

    done = run(export, partition_key(hour))
    assert done.error is None
    evaluation = done.checks["volume"]
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    assert evaluation.metadata["unusual_intervals"].value == {
        partition_key(hour): {"rows": 9, "at_least": 15, "at_most": 152}
    }
    assert "has 9 rows; 15 to 152 are usual" in str(evaluation.description)


def test_a_day_is_compared_with_the_days_before_it(source: Source, target: Target, run: RunExport) -> None:
    today = datetime.fromisoformat("2026-03-30T00:00:00+02:00")
    # Clocks went forward on the 29th.
    midnights = [datetime.fromisoformat(f"2026-03-{day}T00:00:00+01:00") for day in (26, 27, 28, 29)]
    for midnight in midnights:
        source.insert("events", *(event(midnight + HOUR) for _ in range(30)))
    source.insert("events", *(event(today + HOUR) for _ in range(300)))
    export = export_of("events", target, today, interval="day", timezone="Europe/Berlin", start="2026-03-20")
    assert run(export, "2026-03-26", "2026-03-29").checks["volume"].passed
    evaluation = run(export, "2026-03-30").checks["volume"]
    assert not evaluation.passed
    assert evaluation.metadata["intervals_compared"].value == 1


def test_without_enough_of_a_past_nothing_is_unusual(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour - DAY) for _ in range(50)))
    evaluation = run(export_of("events", target, hour), partition_key(hour - DAY), partition_key(hour)).checks["volume"]
    assert evaluation.passed
    assert evaluation.metadata["intervals_compared"].value == 0
