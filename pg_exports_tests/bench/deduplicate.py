"""What does it cost to keep each event once, or its newest copy, across intervals? A day of events with each `deduplicate`:
a first load, and a re-run of it that changes nothing.

What these do with events that came twice is the product's business, and its tests'.
"""

import statistics
import sys
from collections.abc import Sequence
from datetime import datetime

from pg_exports.models import Selection
from pg_exports.models.events import EVENTS
from pg_exports.sandbox import Sandbox
from pg_exports_tests.bench import check, dataset, product
from pg_exports_tests.bench.processes import BenchError
from pg_exports_tests.bench.report import Section

WAYS = ("interval", "table", "replace")


def measure(sandbox: Sandbox, rounds: int, events: int, ways: Sequence[str] = WAYS) -> Section:
    """Load a day each way in turn, load it again, and compare the medians.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: loads each way.
        events: twice as many as the day has, about.
        ways: values of `deduplicate`; the first is what the others are compared with.

    Raises:
        BenchError: a run failed, or the table is not what it should be.
    """
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with dataset.new_database(sandbox) as database:
        start, end = dataset.day(sandbox, database, events=round(events / 2 / dataset.TEAM_SHARE))
        expected = check.at_source(sandbox, database, EVENTS.query(Selection(dataset.TEAM, start, end)))
        for number in range(rounds):
            for way in ways:
                seconds[way].append(_load_twice(sandbox, database, start, expected, way))
                first, again = seconds[way][-1]
                sys.stderr.write(
                    f"deduplicate: {way}, run {number + 1} of {rounds}: {first:.1f} s, {again:.1f} s again\n"
                )
    medians = {
        way: [statistics.median(column) for column in zip(*loads, strict=True)] for way, loads in seconds.items()
    }
    least, _ = medians[ways[0]]
    return Section(
        title=f"A day of {expected.rows:,} events with each `deduplicate`",
        header=("`deduplicate`", "first load, seconds", f"x {ways[0]}", "re-run, seconds"),
        rows=[(way, f"{first:.1f}", f"{first / least:.2f}", f"{again:.1f}") for way, (first, again) in medians.items()],
        remarks=[
            f"Medians of {rounds}, in turn, each into an empty schema, and once more without changes. Seconds are from "
            "connecting to the last commit. The table had the source's rows each time.",
        ],
        holds=True,
    )


def _load_twice(
    sandbox: Sandbox, database: str, start: datetime, expected: check.Expected, way: str
) -> tuple[float, float]:
    """The seconds of a load into an empty schema, and of the same again.

    Raises:
        BenchError: as `measure`.
    """
    with dataset.new_schema(sandbox) as schema:
        sandbox.postgres.execute("CHECKPOINT")
        first, again = (
            product.measure_day(sandbox, "events", database, schema, start, "--deduplicate", way)[0] for _ in range(2)
        )
        if wrong := check.difference(expected, *check.at_destination(sandbox, schema, expected)):
            raise BenchError(f"With `deduplicate: {way}` the table has {wrong}.")
    return first.load_seconds, again.load_seconds
