"""What strikes the soak's runs, at which moment, and what it met."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pg_exports.sandbox import postgres_server
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Source, Target
from pg_exports_tests.postgres.refusing_pooler import Refusal, RefusingPooler
from pg_exports_tests.postgres.tcp_proxy import TcpProxy
from pg_exports_tests.soak import rows
from pg_exports_tests.soak.checks import committed
from pg_exports_tests.soak.exports import Day, Order, Ways, model, run
from pg_exports_tests.soak.plan import READ_TIMEOUT, Round
from pg_exports_tests.soak.processes import PATIENCE, Process
from pg_exports_tests.source_rows import HOUR

BYTES_AN_EVENT = {"events": 1_200, "persons": 80, "sessions": 180, "clicks": 5, "visits": 10}
"""Bytes that an export sends to Postgres, by the number of events in an interval of which it has something to send."""

BYTES_AN_INTERVAL = 10_000
"""Bytes of any interval."""

SECONDS_AN_INTERVAL = 0.4
"""What an export takes for one."""

SECONDS_A_QUERY = 0.04
"""What ClickHouse takes for one."""

_REFUSALS = (
    Refusal("08P01", "no more connections allowed (max_client_conn)"),
    Refusal("08P01", "query_wait_timeout"),
    Refusal(
        "XX000", "(EMAXCONNSESSION) max clients reached in session mode - max clients are limited to pool_size: 15"
    ),
    Refusal("XX000", "(EDBHANDLEREXITED) connection to database closed. Check logs for more information"),
)


@dataclass(frozen=True)
class Scene:
    """What a fault can strike."""

    round: Round
    began: datetime
    end: datetime
    source: Source
    target: Target
    processes: list[Process]
    clickhouse: TcpProxy
    postgres: TcpProxy
    pooler: RefusingPooler

    def strike(self) -> None:
        actions: dict[str, Callable[[], None]] = {
            "kill": self.processes[0].kill,
            "cut": self.postgres.cut,
            "lost answers": self.postgres.cut_client,
            "freeze": self.postgres.freeze,
            "restart": lambda: postgres_server.restart(self.target.sandbox.postgres, "fast"),
            "crash": lambda: postgres_server.restart(self.target.sandbox.postgres, "immediate"),
            "ClickHouse cut": self.clickhouse.cut,
            "ClickHouse freeze": self.clickhouse.freeze,
            "late rows": lambda: rows.insert_late(self.source, self._some_hour, 2 * self.round.number),
            "lost update": self._overtake,
            "pooler refuses": self._refuse,
            "nothing": lambda: None,
        }
        actions[self.round.fault]()

    @property
    def _some_hour(self) -> datetime:
        first = self.round.orders[0]
        return first.first + int(self.round.share * first.intervals) * HOUR

    def _overtake(self) -> None:
        """While the first run stands still, its rows change, and a run of the hour that follows brings their later state."""
        order, number = self.round.orders[0], self.round.number
        later = order.last + HOUR if order.last + HOUR < self.end else order.last
        self.postgres.freeze()
        for one in range(5):
            rows.insert_more(self.source, later, one, 2 * number)
        ways = Ways.direct(self.target)
        overtaking = threading.Thread(
            target=run, args=(Order(order.export, later, later), self.source, self.target, ways)
        )
        overtaking.start()
        # It may wait for the first one's locks.
        overtaking.join(0.8 * READ_TIMEOUT)
        self.postgres.thaw()
        overtaking.join(PATIENCE)

    def _refuse(self) -> None:
        """The next statement, and for a while whoever wants to log in."""
        refusal = _REFUSALS[self.round.number % len(_REFUSALS)]
        self.pooler.statement = self.pooler.login = refusal
        time.sleep(self.round.frozen / 4)
        self.pooler.statement = self.pooler.login = None

    @property
    def is_over(self) -> bool:
        return not any(process.is_running for process in self.processes)


@dataclass(frozen=True)
class Struck:
    """What a fault met: what transactions that had written rows were doing, and how much of its range the first run had
    committed.
    """

    writing: str
    committed: int
    intervals: int

    @property
    def is_within_range(self) -> bool:
        return bool(self.writing) or 0 < self.committed < self.intervals

    def __str__(self) -> str:
        return f"{self.writing or 'nothing written'}, {self.committed} of {self.intervals} done"


def strike(scene: Scene, day: Day) -> Struck | None:
    """Strike at the round's moment. Gives what it met; None where the runs were over before."""
    first, share = scene.round.orders[0], scene.round.share
    seen: list[Struck] = []

    def look() -> None:
        done = newly_committed(scene.target, first, scene.began)
        seen.append(Struck(being_written(scene.target), done, first.intervals))

    def act() -> None:
        look()
        scene.strike()

    if "ClickHouse" in scene.round.fault:
        queries, rest = divmod(share * first.intervals, 1)
        if wait(lambda: scene.clickhouse.connections_made > queries, scene):
            time.sleep(rest * SECONDS_A_QUERY)
            # A look takes as long as a query.
            scene.strike()
            look()
    elif scene.round.by_bytes:
        done = scene.postgres.after(int(share * bytes_to_send(scene.target, first, day)), act)
        wait(done.is_set, scene)
    elif wait(lambda: scene.postgres.connections_made > 0, scene):
        time.sleep(share * SECONDS_AN_INTERVAL * first.intervals)
        if not scene.is_over:
            act()
    if "freeze" in scene.round.fault:
        time.sleep(scene.round.frozen)
        scene.clickhouse.thaw()
        scene.postgres.thaw()
    return seen[0] if seen else None


def wait(holds: Callable[[], bool], scene: Scene) -> bool:
    """Wait until something holds or every run is over, or hangs; gives whether it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds() and not scene.is_over and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def bytes_to_send(target: Target, order: Order, day: Day) -> float:
    """About how many bytes a run sends to Postgres: of events those that are not there, of rows to be merged all."""
    there = [] if model(order.export, target).merge else committed(target, order.export)
    lacking = sum(order.first <= hour <= order.last and hour not in there for hour in day.hours)
    return lacking * BYTES_AN_EVENT[order.export] * day.events / len(day.hours) + order.intervals * BYTES_AN_INTERVAL


def being_written(target: Target) -> str:
    """What the transactions do that have written rows; empty where there is none."""
    rows = target.rows(
        f"""
        SELECT DISTINCT CASE
            WHEN query LIKE 'COPY%' THEN 'in COPY'
            WHEN query LIKE '%INTO "public"."pg_exports_ledger"%' THEN 'before COMMIT'
            WHEN query = 'COMMIT' THEN 'in COMMIT'
            ELSE 'between COPYs'
        END
        FROM pg_stat_activity WHERE usename = '{ROLE}' AND backend_xid IS NOT NULL
        """
    )
    return ", ".join(sorted(phase for (phase,) in rows))


def newly_committed(target: Target, order: Order, since: datetime) -> int:
    """How many of an order's intervals were committed since then."""
    [(count,)] = target.rows(
        f"SELECT count(DISTINCT interval_start) FROM pg_exports_ledger WHERE destination = '{order.export}'"
        f" AND committed_at > '{since}' AND interval_start BETWEEN '{order.first}' AND '{order.last}'"
    )
    return int(count)
