"""What a cluster did: sampled while it runs, and read off Dagster, Celery's result backend and the ledger afterwards."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pg_exports_tests.cluster.deployment import LIMIT, Cluster
from pg_exports_tests.conftest import TEAM

PARENT = "dagster/parent_run_id"

LONGEST_IDLE = 5.0
"""Seconds in a row in which a worker may be without a run while one waits in the broker: samples are a second apart."""


@dataclass
class Samples:
    """What was seen from second to second, until `stop`.

    Attributes:
        connections: the most that exports had at a time.
        busy: the most workers that had a run at a time.
        idle: the longest that a worker which answers had nothing while a run waited in the broker, in seconds, by worker.
    """

    cluster: Cluster
    connections: int = 0
    busy: int = 0
    idle: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Samples":
        self._threads = [threading.Thread(target=self._sample, args=(look,)) for look in (self._connect, self._watch())]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _sample(self, look: Callable[[], None]) -> None:
        while not self._over.wait(0.2):
            try:
                look()
            except Exception as error:  # noqa: BLE001 - shown with the figures
                self.errors.append(f"{type(error).__name__}: {error}")

    def _connect(self) -> None:
        [(number,)] = self.cluster.rows(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_exports' AND usename = 'exporter'"
        )
        self.connections = max(self.connections, int(number))

    def _watch(self) -> Callable[[], None]:
        since: dict[str, float] = {}

        def look() -> None:
            waiting = self.cluster.broker.waiting()
            doing = self.cluster.doing()
            waiting = min(waiting, self.cluster.broker.waiting())
            self.busy = max(self.busy, sum(bool(tasks) for tasks in doing.values()))
            for name, tasks in doing.items():
                may_take = waiting and not tasks and self.cluster.workers[name].state in ("runs", "cut off, back")
                began = since.setdefault(name, time.monotonic()) if may_take else since.pop(name, None)
                if may_take and began:
                    self.idle[name] = max(self.idle.get(name, 0), time.monotonic() - began)

        return look


@dataclass(frozen=True)
class Recovery:
    """A run that was lost, and the one that took its place. A worker that comes back may complete the first one, too."""

    run_id: str
    worker: str | None
    status: str
    retry_id: str
    retry_worker: str | None
    retry_status: str

    @property
    def holds(self) -> bool:
        """Whether another worker has done what was left."""
        return self.retry_status == "SUCCESS" and self.retry_worker != self.worker


@dataclass(frozen=True)
class Share:
    """What one worker did: runs that it began, those among them that took the place of a lost one, intervals, rows."""

    worker: str
    became: str
    runs: int
    retries: int
    intervals: int
    rows: int


def shares(cluster: Cluster, runs: list[dict[str, Any]]) -> list[Share]:
    """Of each worker, the first one first."""
    committed = {
        run_id: (int(intervals), int(rows))
        for run_id, intervals, rows in cluster.rows(
            "SELECT run_id, count(*), sum(rows_inserted)::bigint FROM pg_exports_ledger GROUP BY run_id"
        )
    }
    whose = {run["runId"]: cluster.worker_of(run) for run in runs}
    found = []
    for name, worker in cluster.workers.items():
        own = [run for run in runs if whose[run["runId"]] == name]
        did = [committed.get(run["runId"], (0, 0)) for run in own]
        retries = sum(PARENT in run["tags"] for run in own)
        found.append(
            Share(name, worker.state, len(own), retries, sum(count for count, _ in did), sum(rows for _, rows in did))
        )
    return found


def recoveries(cluster: Cluster, runs: list[dict[str, Any]]) -> list[Recovery]:
    """Of each run that Dagster has started again, the first one first."""
    by_id = {run["runId"]: run for run in runs}
    retries = [(by_id[run["tags"][PARENT]], run) for run in reversed(runs) if PARENT in run["tags"]]
    return [
        Recovery(
            lost["runId"],
            cluster.worker_of(lost),
            lost["status"],
            retry["runId"],
            cluster.worker_of(retry),
            retry["status"],
        )
        for lost, retry in retries
    ]


@dataclass(frozen=True)
class Rows:
    """What the source has, what landed, and how many different ones."""

    at_source: int
    landed: int
    different: int
    same: bool

    @property
    def holds(self) -> bool:
        """Whether each row of the source is there once, and no other."""
        return self.same and self.at_source == self.landed == self.different


def rows(cluster: Cluster) -> Rows:
    """Compare the tables by their rows' identities."""
    with cluster.sandbox.clickhouse_client(cluster.variables["CLICKHOUSE_DATABASE"]) as client:
        source = client.query(
            "SELECT toString(uuid) FROM events WHERE team_id = {team:Int64}", {"team": TEAM}
        ).result_rows
    landed = cluster.rows("SELECT uuid::text FROM events")
    different = {uuid for (uuid,) in landed}
    return Rows(len(source), len(landed), len(different), {uuid for (uuid,) in source} == different)


def text(found: list[Share], recovered: list[Recovery], counted: Rows, samples: Samples) -> str:
    """All of it, as a person reads it."""
    lines = [f"{'worker':<8} {'what became of it':<18} {'runs':>5} {'retries':>8} {'intervals':>10} {'rows':>9}"]
    lines += [f"{s.worker:<8} {s.became:<18} {s.runs:>5} {s.retries:>8} {s.intervals:>10,} {s.rows:>9,}" for s in found]
    lines += ["", "Lost runs, and what took their place:"]
    lines += [
        f"  {r.run_id[:8]} on {r.worker}: {r.status} -> {r.retry_id[:8]} on {r.retry_worker}: {r.retry_status}"
        for r in recovered
    ]
    idle = max(samples.idle.values(), default=0.0)
    lines += [
        "",
        f"Rows in ClickHouse {counted.at_source:,}, in Postgres {counted.landed:,}, different ones {counted.different:,}",
        f"Connections to Postgres at a time: {samples.connections}, allowed {LIMIT}",
        f"Workers with a run at a time: {samples.busy}; the pool allows {LIMIT} runs, whatever the number of workers",
        f"Longest that a worker had nothing while a run waited for one: {idle:.1f} s",
        *(f"A look failed: {error}" for error in sorted(set(samples.errors))),
    ]
    return "\n".join(lines)
