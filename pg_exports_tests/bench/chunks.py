"""How many intervals should a run of a backfill have? Backfills over three Celery workers, in runs of several sizes; and a
year of hours in runs of the default size.

Where the workers' time went is read off Dagster's storage (when each run began and ended) and off the ledger (when each
transaction did): what is no transaction is bookkeeping. The cluster is that of `make cluster`, with nothing that goes wrong.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pg_exports.export import MAX_PARTITIONS_PER_RUN
from pg_exports.sandbox import Sandbox, servers, source_tables
from pg_exports.sandbox.servers import INSTANCE, SOURCE_DATABASE
from pg_exports_tests.bench.dataset import HOUR
from pg_exports_tests.bench.processes import BenchError
from pg_exports_tests.bench.report import Section
from pg_exports_tests.cluster import figures
from pg_exports_tests.cluster.deployment import Cluster, cluster
from pg_exports_tests.cluster.rows import fill

WORKERS = ("one", "two", "three")

YEAR = 8_760
"""Intervals of the long backfill."""

SIZES = (24, 168, 720)
"""Intervals of a run, of backfills of `QUARTER` intervals."""

QUARTER = 2_160

MOST_BOOKKEEPING = 0.2
"""Of the workers' time, in the long backfill."""

PATIENCE = 3_600

ONE_EVENT_A_RUN = {"DAGSTER_EMIT_PARTITION_SUBSET_IN_PLANNED_EVENTS": "1"}
"""As `deploy/celery/pg-exports-daemon.service` sets it."""

_RUNS = """
SELECT run_id, start_time, end_time FROM runs WHERE status = 'SUCCESS'
"""

_HOURS = """
SELECT count(*), min(events), max(events)
FROM (SELECT count(*) AS events FROM events GROUP BY timestamp) AS hours
"""

_IN_TRANSACTIONS = """
SELECT sum(extract(epoch FROM ended - started_at))::float8
FROM (SELECT started_at, max(committed_at) AS ended FROM pg_exports_ledger GROUP BY run_id, started_at) AS transactions
"""


@dataclass(frozen=True)
class Backfill:
    """What a backfill over the workers was.

    Attributes:
        intervals, chunk, runs, rows: its size.
        seconds: from its launch to the end of its last run.
        waited: seconds from its launch until the first run had begun.
        busy: seconds from then until a worker had nothing more to take, over all workers.
        in_runs: of these, those in which they had a run.
        in_transactions: seconds of all transactions.
        all_runs: seconds of all runs.
        idle: the longest that one had nothing while a run waited for one, in seconds.
        connections: the most at a time.
    """

    intervals: int
    chunk: int
    runs: int
    rows: int
    seconds: float
    waited: float
    busy: float
    in_runs: float
    in_transactions: float
    all_runs: float
    idle: float
    connections: int

    @property
    def bookkeeping(self) -> float:
        """The share of the workers' time that was spent on something else than transactions."""
        between = self.busy - self.in_runs
        return 1 - self.in_transactions / (self.all_runs + between)

    def row(self) -> tuple[str, ...]:
        """As a row of the report."""
        return (
            f"{self.intervals:,}",
            f"{self.rows:,}",
            f"{self.chunk:,}",
            f"{self.runs}",
            f"{self.seconds:.0f}",
            f"{self.waited:.0f}",
            f"{self.rows / self.seconds:,.0f}",
            f"{100 * self.bookkeeping:.0f} %",
            f"{100 * (1 - self.in_runs / self.busy):.0f} %",
            f"{self.idle:.1f}",
            f"{self.connections}",
        )


def measure(
    sandbox: Sandbox,
    rounds: int,
    events: int,
    year: int = YEAR,
    quarter: int = QUARTER,
    sizes: Sequence[int] = SIZES,
) -> Section:
    """Do each backfill once.

    Args:
        sandbox: not used: the cluster's Postgres has Dagster's storage, too, and listens elsewhere.
        rounds: not used.
        events: 500 times those of an hour of the long backfill; the others have a quarter of these.
        year: intervals of the long backfill.
        quarter: of the others; 0 leaves them out.
        sizes: of the runs of these.

    Raises:
        BenchError: a backfill failed, or the table does not hold what the source has.
    """
    an_hour = max(4, events // 500)
    found = [backfill(quarter, size, an_hour // 4) for size in sizes if quarter]
    long = backfill(year, MAX_PARTITIONS_PER_RUN, an_hour)
    return section([*found, long])


def section(found: Sequence[Backfill]) -> Section:
    """What the backfills were, of which the last is the long one."""
    long = found[-1]
    holds = long.bookkeeping < MOST_BOOKKEEPING and long.idle <= figures.LONGEST_IDLE
    return Section(
        title=f"Backfills over {len(WORKERS)} workers",
        header=(
            "intervals",
            "events",
            "`max_partitions_per_run`",
            "runs",
            "seconds",
            "until the first began",
            "events/s",
            "bookkeeping",
            "of it between runs",
            "longest idle, s",
            "connections",
        ),
        rows=[one.row() for one in found],
        remarks=[
            "Launched through the web server as the UI does; broker, storage, web server, daemon, three workers with a run "
            "each, ClickHouse and Postgres on one machine. Each hour had as many rows in the table as in the source.",
            "Bookkeeping is the share of the workers' time that was no transaction: starting a run, Dagster's events, checks. "
            f"The long one must stay below {100 * MOST_BOOKKEEPING:.0f} %. Between runs is the share in which a worker had "
            "none, until there was none left to take.",
            "`longest idle`: a worker without a run while one waited in the broker, as seen from second to second.",
        ],
        holds=holds,
    )


def backfill(intervals: int, chunk: int, events: int) -> Backfill:
    """One backfill on a cluster of its own, of so many events in each hour."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = end - intervals * HOUR
    with tempfile.TemporaryDirectory(prefix="pg_exports_chunks_") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        sandbox = servers.start(Path(folder) / "servers")
        try:
            source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
            for first in range(0, intervals, _FILLED_TOGETHER):
                count = min(_FILLED_TOGETHER, intervals - first)
                fill(sandbox, SOURCE_DATABASE, start + first * HOUR, count, events)
            with cluster(
                home,
                sandbox,
                *WORKERS,
                start=start.isoformat(),
                chunk=chunk,
                variables=ONE_EVENT_A_RUN,
                on_hosts=False,
            ) as running:
                done = _run(running, intervals, chunk, events)
        finally:
            servers.stop(sandbox)
    sys.stderr.write(
        f"chunks: {intervals:,} intervals by {chunk}: {done.seconds:.0f} s, {done.bookkeeping:.0%} bookkeeping\n"
    )
    return done


_FILLED_TOGETHER = 720
"""Hours whose events are made by one statement, in bounded memory."""


def _run(running: Cluster, intervals: int, chunk: int, events: int) -> Backfill:
    keys = list(running.deployment.partitions("events"))
    with figures.Samples(running) as samples:
        launched = datetime.now(UTC).timestamp()
        backfill = running.deployment.backfill("events", keys)
        running.deployment.wait(backfill, seconds=PATIENCE)
    times = {
        str(run): (float(str(began)), float(str(ended)))
        for run, began, ended in running.sandbox.postgres.rows(_RUNS, INSTANCE)
    }
    workers: dict[str, list[tuple[float, float]]] = {}
    for run in running.deployment.runs(backfill):
        workers.setdefault(str(running.worker_of(run)), []).append(times[run["runId"]])
    [(hours, fewest, most)] = running.rows(_HOURS)
    if (hours, fewest, most) != (intervals, events, events):
        raise BenchError(
            f"{hours:,} hours landed with {fewest:,} to {most:,} events, not {intervals:,} with {events:,}."
        )
    began = min(began for began, _ in times.values())
    # From then on no run waits for a worker.
    over = max(began for began, _ in times.values())
    [(in_transactions,)] = running.rows(_IN_TRANSACTIONS)
    return Backfill(
        intervals=intervals,
        chunk=chunk,
        runs=len(times),
        rows=intervals * events,
        seconds=max(ended for _, ended in times.values()) - launched,
        waited=began - launched,
        busy=len(WORKERS) * max(over - began, 1e-3),
        in_runs=sum(min(ended, over) - first for first, ended in times.values() if first < over),
        in_transactions=float(str(in_transactions)),
        all_runs=sum(ended - first for first, ended in times.values()),
        idle=max(samples.idle.values(), default=0.0),
        connections=samples.connections,
    )
