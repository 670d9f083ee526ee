"""What does a small interval cost beside Dagster itself? An hour of about a thousand events through `dg launch`, in turn
with an asset that does nothing, in a project that does not know this package.
"""

import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from pg_exports.sandbox import Sandbox
from pg_exports_tests.bench import dataset, processes, ranges
from pg_exports_tests.bench.dataset import HOUR
from pg_exports_tests.bench.report import Section

EVENTS = 1_000
"""Of the team in an interval, about."""

LEAST_ROUNDS = 5

RATIO = 1.5
"""What the export may take, of what nothing takes."""

NOTHING = """
import dagster as dg


@dg.asset(partitions_def=dg.HourlyPartitionsDefinition(start_date="{start:%Y-%m-%d-%H:%M}"))
def nothing() -> None:
    pass


defs = dg.Definitions(assets=[nothing], executor=dg.in_process_executor)
"""

IMPORTS = "import os; os.dup2(1, 2); import dagster; import pg_exports.definitions"
"""What is timed of the start-up. Python writes the times to stderr."""


def measure(sandbox: Sandbox, rounds: int, events: int = EVENTS, least_rounds: int = LEAST_ROUNDS) -> Section:
    """Launch both in turn, and compare the medians.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: launches of each; `least_rounds` where that is more.
        events: of an interval.
        least_rounds: how many it takes to trust a median.

    Raises:
        BenchError: a run failed, or an export has not written its rows.
    """
    rounds = max(rounds, least_rounds)
    exporting, idle = _seconds(sandbox, rounds, events)
    ratio = exporting / idle
    dagster, package, pandas = _import_seconds(sandbox)
    return Section(
        title="A small interval",
        header=("`dg launch --partition`", "seconds"),
        rows=[
            (f"an hour of about {events:,} events", f"{exporting:.2f}"),
            ("an asset that does nothing", f"{idle:.2f}"),
            ("ratio", f"{ratio:.2f}"),
        ],
        remarks=[
            f"The whole process, imports included; medians of {rounds}, in turn; at most {RATIO} times is promised."
            + ("" if ratio <= RATIO else " **It took more.**"),
            f"Of the start-up, by `python -X importtime`: `import dagster` takes {dagster:.2f} s, and "
            f"`import pg_exports.definitions` {package:.2f} s beyond that, {pandas:.2f} s of them pandas, which comes with "
            "the sandbox: a deployment does without it.",
        ],
        holds=ratio <= RATIO,
    )


def _seconds(sandbox: Sandbox, rounds: int, events: int) -> tuple[float, float]:
    """The medians of the export and of nothing. Each round exports another hour."""
    exporting, idle = [], []
    with (
        dataset.new_database(sandbox) as database,
        dataset.new_schema(sandbox) as schema,
        tempfile.TemporaryDirectory() as export,
        tempfile.TemporaryDirectory() as nothing,
    ):
        of_both_teams = round(events / dataset.TEAM_SHARE)
        start, _ = dataset.equal_hours(sandbox, database, count=rounds, events=of_both_teams)
        ranges.new_export_project(Path(export), "events", schema, start)
        ranges.new_project(Path(nothing), NOTHING.format(start=start))
        for number in range(rounds):
            hour = start + number * HOUR
            idle.append(_launch(sandbox, nothing, "nothing", hour))
            exporting.append(_launch(sandbox, export, "events", hour, database))
            expected = ranges.rows_at_source(sandbox, database, "events", start, hour + HOUR)
            ranges.check_landed(sandbox, schema, "events", expected)
            sys.stderr.write(f"small runs: {number + 1} of {rounds}: {exporting[-1]:.2f} s, nothing {idle[-1]:.2f} s\n")
    return statistics.median(exporting), statistics.median(idle)


def _launch(sandbox: Sandbox, project: str, asset: str, hour: datetime, database: str = "") -> float:
    partition = ("--partition", dataset.key(hour))
    return ranges.launch(sandbox, Path(project), asset, *partition, database=database).seconds


def _import_seconds(sandbox: Sandbox) -> tuple[float, float, float]:
    """What `import dagster` takes, what the package takes beyond it, and what pandas takes of that."""
    lines = processes.run([sys.executable, "-X", "importtime", "-c", IMPORTS], sandbox).output.splitlines()
    # `import time: self [us] | cumulative | name`, the name indented where another module imports it.
    parts = [line.split(" | ", 2) for line in lines if line.startswith("import time:")]
    outermost = {name: int(cumulative) for _, cumulative, name in parts if not name.startswith(" ")}
    package = sum(micros for name, micros in outermost.items() if name.startswith("pg_exports"))
    # pyarrow, for ADBC, imports pandas where it is installed.
    pandas = sum(int(cumulative) for _, cumulative, name in parts if name.strip() == "pandas")
    return outermost["dagster"] / 1e6, package / 1e6, pandas / 1e6
