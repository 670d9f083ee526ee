"""Does one interval land sooner over several connections? A day of events over one, two and four of them, what that costs on
both sides of the wire, and how busy the machine is meanwhile.

That the connections were really used is read from Postgres's own log, and that the table has the source's rows from the
table. How the connections share an interval is the product's business (`pg_exports.postgres.streams`).
"""

import os
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pg_exports.models import Selection
from pg_exports.models.events import EVENTS
from pg_exports.sandbox import Sandbox
from pg_exports_tests.bench import check, dataset, product
from pg_exports_tests.bench.processes import BenchError, Usage
from pg_exports_tests.bench.product import Result
from pg_exports_tests.bench.report import Section

STREAMS = (1, 2, 4)

MB = 1_000_000

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Load:
    """One load, and what it cost."""

    result: Result
    usage: Usage

    @property
    def seconds(self) -> float:
        """From connecting to the last commit."""
        return self.result.load_seconds

    @property
    def cpu_seconds(self) -> float:
        """Of the client's run and of both servers."""
        return self.result.cpu_seconds + self.usage.postgres_cpu + self.usage.clickhouse_cpu

    @property
    def busy_cores(self) -> float:
        """How many cores these three had at work on average, as long as the run took."""
        return self.cpu_seconds / self.result.seconds


@dataclass
class Loads:
    """All loads over so many streams."""

    streams: int
    loads: list[Load] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(load.seconds for load in self.loads)

    @property
    def busy_cores(self) -> float:
        """The median."""
        return statistics.median(load.busy_cores for load in self.loads)

    def row(self, rows: int, one: float) -> tuple[str, ...]:
        """As a row of the report.

        Args:
            rows: that each has brought.
            one: the seconds over one stream.
        """
        loads = self.loads
        cpu = (
            statistics.median(load.result.cpu_seconds for load in loads),
            statistics.median(load.usage.postgres_cpu for load in loads),
            statistics.median(load.usage.clickhouse_cpu for load in loads),
        )
        return (
            f"{self.streams}",
            f"{self.seconds:.1f}",
            f"{self.seconds / one:.2f}",
            f"{rows / self.seconds:,.0f}",
            *(f"{seconds:.1f}" for seconds in cpu),
            f"{max(load.result.peak_bytes for load in loads) / MB:.0f}",
            f"{self.busy_cores:.2f}",
        )


def measure(sandbox: Sandbox, rounds: int, events: int, streams: Sequence[int] = STREAMS) -> Section:
    """Load a day over each number of streams in turn, and compare the medians.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: loads over each.
        events: of the day, about.
        streams: how many connections; the first is what the others are compared with.

    Raises:
        BenchError: a run failed, used another number of connections, or the table is not what it should be.
    """
    measured = [Loads(number) for number in streams]
    with dataset.new_database(sandbox) as database:
        start, end = dataset.day(sandbox, database, events=round(events / dataset.TEAM_SHARE))
        expected = check.at_source(sandbox, database, EVENTS.query(Selection(dataset.TEAM, start, end)))
        for number in range(rounds):
            for loads in measured:
                loads.loads.append(_load(sandbox, database, start, expected, loads.streams))
                sys.stderr.write(
                    f"streams: {expected.rows:,} events over {loads.streams}, run {number + 1} of {rounds}:"
                    f" {loads.loads[-1].seconds:.1f} s, {loads.loads[-1].busy_cores:.2f} of {CORES} cores busy\n"
                )
    return section(measured, expected.rows, rounds)


def section(measured: Sequence[Loads], rows: int, rounds: int) -> Section:
    """What the loads were, as a section of the report."""
    first = measured[0]
    cpu = statistics.median(load.cpu_seconds for load in first.loads)
    busy = ", ".join(f"{loads.busy_cores:.1f} over {loads.streams}" for loads in measured)
    return Section(
        title=f"A day of {rows:,} events over several connections",
        header=(
            "`streams`",
            "seconds",
            f"x {first.streams} stream",
            "rows/s",
            "CPU s client",
            "Postgres",
            "ClickHouse",
            "peak MB",
            "cores busy",
        ),
        rows=[loads.row(rows, first.seconds) for loads in measured],
        remarks=[
            f"Medians of {rounds} (the highest peak), in turn, each into an empty schema after a CHECKPOINT. `seconds` are "
            "from connecting to the last commit. The table had the source's rows each time, and Postgres's log a COPY on as "
            "many connections as `streams` says.",
            f"CPU of this machine: of {CORES} cores {busy} were busy, by the client, Postgres and ClickHouse together "
            f"(their CPU seconds by the seconds of the run). With all {CORES} at work all the time, the {cpu:.1f} CPU seconds "
            f"of a run over {first.streams} would take {cpu / CORES:.1f} s: more streams cannot be faster than that here.",
            "The client's CPU is that of the run without its imports, and with what Dagster does before and after the load; "
            "its peak memory is with the imports.",
        ],
        holds=True,
    )


def _load(sandbox: Sandbox, database: str, start: datetime, expected: check.Expected, streams: int) -> Load:
    """One load into an empty schema.

    Raises:
        BenchError: as `measure`.
    """
    with dataset.new_schema(sandbox) as schema:
        sandbox.postgres.execute("CHECKPOINT")
        logged = sandbox.postgres.log.stat().st_size
        load = Load(*product.measure_day(sandbox, "events", database, schema, start, "--streams", str(streams)))
        if wrong := check.difference(expected, *check.at_destination(sandbox, schema, expected)):
            raise BenchError(f"Over {streams} streams the table has {wrong}.")
        used = connections(sandbox, schema, logged)
        if used != streams:
            raise BenchError(f"{used} connections copied events, not {streams}.")
    return load


def connections(sandbox: Sandbox, schema: str, since: int) -> int:
    """How many connections have copied into a schema's table of events, from a place in Postgres's log on."""
    with sandbox.postgres.log.open(errors="replace") as log:
        log.seek(since)
        copies = re.findall(rf'\[(\d+)\] [^\n]*COPY "{re.escape(schema)}" ?\. ?"events"', log.read())
    return len(set(copies))
