"""A soak: exports of one day run in processes of their own, faults strike them at random moments, round after round.

`make soak`, or `python -m pg_exports_tests.soak --rounds 30 --seed 7`. A seed gives the same rows, ranges, faults and
moments; what exactly a fault meets is up to the machine. After each round the destination must hold whole intervals and
nothing else (`soak_checks`); at the end the faults stop, every interval is exported once more, and the destination must
hold what the source has.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import dagster as dg

from pg_exports.models import MODELS
from pg_exports.postgres import ingest, io_manager, journal
from pg_exports.sandbox import postgres_server, sample_data, servers, source_tables
from pg_exports.sandbox.servers import ROLE, SOURCE_DATABASE
from pg_exports_tests.conftest import Run, Source, Target, materialise, partition_key
from pg_exports_tests.faults import eventually, with_own_postgres
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.soak_checks import (
    DAY,
    HOUR,
    LATE,
    REFUSED,
    check_at_the_end,
    check_between_rounds,
    committed,
)
from pg_exports_tests.source_rows import event, export_of, insert_sessions, mapping, person, session

FAULTS = (
    "kill",
    "cut",
    "lost answers",
    "freeze",
    "restart",
    "crash",
    "ClickHouse cut",
    "ClickHouse freeze",
    "late rows",
    "nothing",
)

BYTES_AN_EVENT = {"events": 1_200, "persons": 80, "sessions": 180}
"""Bytes that an export sends to Postgres, by the number of events in an interval of which it has something to send."""

BYTES_AN_INTERVAL = 10_000
"""Bytes of any interval."""

SECONDS_AN_INTERVAL = 0.4
"""What an export takes for one."""

SECONDS_A_QUERY = 0.04
"""What ClickHouse takes for one."""

READ_TIMEOUT = 2
"""Seconds of both connections."""

PATIENCE = 180
"""Seconds after which a run hangs."""

_SPAWN = multiprocessing.get_context("spawn")


# What is to happen


@dataclass(frozen=True)
class Day:
    """What there is to export.

    Attributes:
        length: hours.
        events: in all of them.
        longest: the most intervals of a run.
    """

    length: int = 24
    events: int = 12_000
    longest: int = 6

    @property
    def hours(self) -> list[datetime]:
        """When each begins."""
        return [DAY + n * HOUR for n in range(self.length)]

    @property
    def end(self) -> datetime:
        return DAY + self.length * HOUR


@dataclass(frozen=True)
class Order:
    """What one process exports: the intervals from the first to the last, in one run."""

    model: str
    first: datetime
    last: datetime

    @property
    def intervals(self) -> int:
        return (self.last - self.first) // HOUR + 1

    def __str__(self) -> str:
        until = "" if self.first == self.last else f"-{self.last + HOUR:%H}"
        return f"{self.model} {self.first:%H}{until}"


@dataclass(frozen=True)
class Round:
    """Runs at the same time, and the fault that strikes them.

    Attributes:
        share: how far on its way the first run is then: of the bytes that it sends, or of the time that it takes; where
            ClickHouse is at fault, of the queries that it asks.
        by_bytes: which of the first two.
        frozen: seconds until what was frozen moves again.
        prunes: key journals are pruned before it.
    """

    number: int
    orders: tuple[Order, ...]
    fault: str
    share: float
    by_bytes: bool
    frozen: float
    prunes: bool


def plan(seed: int, rounds: int, day: Day) -> Iterator[Round]:
    """The rounds of a seed. Every fault comes about as often."""
    dice = random.Random(seed)
    faults = [FAULTS[n % len(FAULTS)] for n in range(-(-rounds // len(FAULTS)) * len(FAULTS))]
    dice.shuffle(faults)
    for number, fault in enumerate(faults[:rounds], 1):
        first = _order(dice, day)
        # More often than not into the same table, some of the same intervals among them.
        others = [
            _order(dice, day, beside=first if dice.random() < 0.7 else None)
            for _ in range(dice.choice((0, 0, 0, 1, 1, 2)))
        ]
        yield Round(
            number,
            (first, *others),
            fault,
            share=dice.random(),
            by_bytes=dice.random() < 0.6,
            frozen=dice.uniform(0.2, 2 * READ_TIMEOUT),
            prunes=dice.random() < 0.2,
        )


def _order(dice: random.Random, day: Day, beside: Order | None = None) -> Order:
    """Any order, or one that shares intervals with another."""
    hours, intervals = day.hours, dice.randint(1, day.longest)
    earliest, latest = 0, len(hours) - intervals
    if beside:
        earliest = max(earliest, hours.index(beside.first) - intervals + 1)
        latest = min(latest, hours.index(beside.last))
    first = dice.randint(earliest, latest)
    # Events first: theirs is the way that leaves most to go wrong.
    model = beside.model if beside else dice.choice(("events", "events", "persons", "sessions"))
    return Order(model, hours[first], hours[first + intervals - 1])


# Runs


@dataclass(frozen=True)
class Ways:
    """The ports at which a run finds the servers, and after how many seconds it takes them for frozen."""

    clickhouse: int
    postgres: int
    read_timeout: int

    @classmethod
    def direct(cls, target: Target) -> "Ways":
        """Without proxies between, and without haste."""
        sandbox = target.sandbox
        return cls(sandbox.clickhouse.https_port or 0, sandbox.postgres.port, read_timeout=60)


@dataclass(frozen=True)
class End:
    """How a run ended, after how many tries."""

    how: Literal["ok", "failed", "killed"]
    tries: int = 0
    error: str = ""

    def __str__(self) -> str:
        if self.how == "killed":
            return "killed"
        after = f" after {self.tries} tries" if self.tries > 1 else ""
        return f"{self.how}{after}" + (f": {self.error.splitlines()[0]}" if self.error else "")


class Process:
    """A run in a process of its own."""

    def __init__(self, order: Order, source: Source, target: Target, ways: Ways) -> None:
        self._order = order
        self._answer, theirs = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=_run_here, args=(order, source, target, ways, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._was_killed = False

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL: it can do nothing more, not even hang up in good order."""
        self._was_killed = True
        self._process.kill()

    def end(self) -> End:
        """Wait for its end.

        Raises:
            AssertionError: it hangs, it crashed, or it failed with an error that does not pass.
        """
        self._process.join(PATIENCE)
        assert not self.is_running, f"{self._order} hangs"
        with contextlib.suppress(EOFError):
            end: End = self._answer.recv()
            # One that does not pass is not tried again.
            assert end.how == "ok" or end.tries == 1 + io_manager.RETRIES.max_retries, f"{self._order}: {end.error}"
            return end
        assert self._was_killed, f"{self._order} ended with {self._process.exitcode}"
        return End("killed")


def _run_here(order: Order, source: Source, target: Target, ways: Ways, answer: Connection) -> None:
    """What the process does. Rows go in many small pieces, so that there is much between the first and the last."""
    ingest.COPY_BYTES, journal.PIECE = 20_000, 100
    io_manager.RETRIES = dg.RetryPolicy(
        max_retries=io_manager.RETRIES.max_retries, delay=0.2, backoff=dg.Backoff.EXPONENTIAL
    )
    done = run(order, source, target, ways)
    answer.send(End("failed" if done.error else "ok", done.tries, done.error or ""))


def run(order: Order, source: Source, target: Target, ways: Ways) -> Run:
    """Run an order in this process, without Dagster's log on the console."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return materialise(
            export_of(order.model, target, DAY),
            source.resource(port=ways.clickhouse, read_timeout=ways.read_timeout),
            target.resource(port=ways.postgres, read_timeout=ways.read_timeout),
            partition_key(order.first),
            partition_key(order.last),
        )


# Faults


@dataclass(frozen=True)
class Scene:
    """What a fault can strike."""

    round: Round
    began: datetime
    source: Source
    target: Target
    processes: list[Process]
    clickhouse: TcpProxy
    postgres: TcpProxy

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
            "late rows": lambda: insert_late_rows(self.source, self.round),
            "nothing": lambda: None,
        }
        actions[self.round.fault]()

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
    model = MODELS[order.model]
    there = [] if model.merge else committed(target, model)
    lacking = sum(order.first <= hour <= order.last and hour not in there for hour in day.hours)
    return lacking * BYTES_AN_EVENT[model.name] * day.events / len(day.hours) + order.intervals * BYTES_AN_INTERVAL


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


def insert_late_rows(source: Source, played: Round) -> None:
    """New events, another version of a person and another part of a session, in the range of the round's first run."""
    dice = random.Random(played.number)
    hour = played.orders[0].first + dice.randrange(played.orders[0].intervals) * HOUR
    moment = hour + timedelta(minutes=dice.randrange(60))
    source.insert("events", *(event(moment, distinct_id=f"{LATE} {number}") for number in range(20)))
    one = dice.randrange(5)
    source.insert("person", person(moment, uuid.UUID(int=one), played.number))
    source.insert("person_distinct_id2", mapping(moment, f"{LATE} {one}", uuid.UUID(int=one)))
    ended = DAY + timedelta(seconds=played.number)
    insert_sessions(source, session(session_id(one), moment, distinct_id=LATE, started=DAY, ended=ended))


def session_id(number: int) -> uuid.UUID:
    """A UUIDv7 of the day's first moment."""
    return uuid.UUID(int=int(DAY.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | number)


# The soak


@dataclass
class Summary:
    """What happened, to be counted."""

    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    in_mid_write: Counter[str] = field(default_factory=Counter)
    within_range: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)

    def add(self, fault: str, struck: Struck | None, ends: list[End]) -> None:
        self.faults[fault] += 1
        self.missed[fault] += struck is None
        self.in_mid_write[fault] += bool(struck and struck.writing)
        self.within_range[fault] += bool(struck and struck.is_within_range)
        for end in ends:
            self.ends["ok after several tries" if end.how == "ok" and end.tries > 1 else end.how] += 1

    def __str__(self) -> str:
        lines = [f"{'fault':<18}{'rounds':>7}{'in mid-write':>14}{'in mid-range':>14}{'came too late':>15}"]
        counters = (self.faults, self.in_mid_write, self.within_range, self.missed)
        for fault in self.faults:
            rounds, in_mid_write, within_range, missed = (counter[fault] for counter in counters)
            lines.append(f"{fault:<18}{rounds:>7}{in_mid_write:>14}{within_range:>14}{missed:>15}")
        lines.append("runs: " + ", ".join(f"{count} {how}" for how, count in sorted(self.ends.items())))
        return "\n".join(lines)


def soak(source: Source, target: Target, *, seed: int, rounds: int, day: Day) -> Summary:
    """Fill the source, play the rounds and compare both sides.

    Args:
        source: empty tables.
        target: the schema `public` of a Postgres that may be restarted, without tables.
        seed: of the rounds.
        rounds: how many.
        day: what there is to export.

    Raises:
        AssertionError: something is wrong.
    """
    prepare(source, target, day)
    summary = Summary()
    for planned in plan(seed, rounds, day):
        make_room(target, day, planned)
        play(planned, source, target, day, summary)
        check_between_rounds(source, target)
    target.execute("DROP FUNCTION take_time CASCADE")
    for model in MODELS:
        done = run(Order(model, day.hours[0], day.hours[-1]), source, target, Ways.direct(target))
        assert done.error is None, done.error
    landed = check_at_the_end(source, target, day.hours)
    print("Equal on both sides: " + ", ".join(f"{count:,} {model}" for model, count in landed.items()))
    return summary


def prepare(source: Source, target: Target, day: Day) -> None:
    """Tables made by the exports themselves, a ledger that takes its time, and a day's rows, some of them bad."""
    for model in MODELS:
        done = run(Order(model, DAY - HOUR, DAY - HOUR), source, target, Ways.direct(target))
        assert done.error is None, done.error
    # By it the interval of an event is known.
    target.execute("ALTER TABLE events ADD COLUMN inserted_at timestamptz", *slow_ledger(0.3))
    sample_data.fill(source.sandbox.execute, source.database, end=day.end, hours=len(day.hours), events=day.events)
    insert_bad_rows(source, day)


def slow_ledger(seconds: float) -> Iterator[str]:
    """Statements after which a transaction waits up to so long between its rows and its COMMIT, and within that."""
    yield f"""
        CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep({seconds} * random()); RETURN NEW; END $$
    """
    timing = "AFTER INSERT OR UPDATE ON pg_exports_ledger"
    yield f"CREATE TRIGGER before_commit {timing} FOR EACH ROW EXECUTE FUNCTION take_time()"
    yield (
        f"CREATE CONSTRAINT TRIGGER in_commit {timing} DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION take_time()"
    )


def insert_bad_rows(source: Source, day: Day) -> None:
    """Some in every fourth hour: rows that are repaired, and rows that are refused."""
    for number, hour in enumerate(day.hours[::4], 1):
        nul, bad = r'{"a": "\u0000"}', f"{REFUSED} {number}"
        source.insert(
            "events",
            event(hour, properties=nul),
            event(hour, properties='{"a": NaN}', distinct_id=bad),
            event(hour, event="x" * 201, distinct_id=bad),
        )
        good_id, bad_id = uuid.UUID(int=100 + number), uuid.UUID(int=200 + number)
        source.insert("person", person(hour, good_id, 1, properties=nul), person(hour, bad_id, 2**31))
        source.insert("person_distinct_id2", mapping(hour, f"nul {number}", good_id), mapping(hour, bad, bad_id))
        insert_sessions(source, session(session_id(100 + number), hour, entry_url="https://a.b/\0"))


def make_room(target: Target, day: Day, planned: Round) -> None:
    """Empty a table that has most intervals: a run that has nothing to write is no great target. Prune key journals."""
    for model in MODELS.values():
        if len(committed(target, model)) > 2 / 3 * len(day.hours):
            print(f"          TRUNCATE {model.name}")
            target.execute(
                f"TRUNCATE {model.name}", f"DELETE FROM pg_exports_rejected WHERE destination = '{model.name}'"
            )
    if planned.prunes:
        target.execute("DELETE FROM pg_exports_keys WHERE random() < 0.5")


def play(planned: Round, source: Source, target: Target, day: Day, summary: Summary) -> None:
    """One round, and the line that tells of it."""
    started = time.monotonic()
    [(began,)] = target.rows("SELECT now()")
    sandbox = target.sandbox
    with (
        tcp_proxy(sandbox.clickhouse.https_port or 0) as clickhouse,
        tcp_proxy(sandbox.postgres.port) as postgres,
    ):
        ways = Ways(clickhouse.port, postgres.port, READ_TIMEOUT)
        processes = [Process(order, source, target, ways) for order in planned.orders]
        struck = strike(Scene(planned, began, source, target, processes, clickhouse, postgres), day)
        ends = [process.end() for process in processes]
    eventually(lambda: not target.rows(f"SELECT FROM pg_stat_activity WHERE usename = '{ROLE}'"))
    summary.add(planned.fault, struck, ends)
    runs = "; ".join(
        f"{order} {end}, {newly_committed(target, order, began)} of {order.intervals} committed"
        for order, end in zip(planned.orders, ends, strict=True)
    )
    met = f"({struck or 'came too late'})"
    print(f"{planned.number:>3} {planned.fault:<17} {met:<36} {runs}  {time.monotonic() - started:.1f} s", flush=True)


def newly_committed(target: Target, order: Order, since: datetime) -> int:
    """How many of an order's intervals were committed since then."""
    [(count,)] = target.rows(
        f"SELECT count(DISTINCT interval_start) FROM pg_exports_ledger WHERE destination = '{order.model}'"
        f" AND committed_at > '{since}' AND interval_start BETWEEN '{order.first}' AND '{order.last}'"
    )
    return int(count)


def main() -> int:
    """Run a soak in a sandbox of its own."""
    parser = argparse.ArgumentParser(prog="python -m pg_exports_tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="a random one by default")
    parser.add_argument("--events", type=int, default=Day.events, help=f"of the day ({Day.events:,})")
    asked = parser.parse_args()
    print(f"{asked.rounds} rounds with SEED={asked.seed}", flush=True)
    began = time.monotonic()
    try:
        with own_servers() as (source, target):
            summary = soak(source, target, seed=asked.seed, rounds=asked.rounds, day=Day(events=asked.events))
    except AssertionError as error:
        print(f"WRONG, with SEED={asked.seed} ROUNDS={asked.rounds}: {error}")
        return 1
    print(f"{summary}\n{asked.rounds} rounds in {time.monotonic() - began:.0f} s, SEED={asked.seed}")
    return 0


@contextlib.contextmanager
def own_servers() -> Iterator[tuple[Source, Target]]:
    """A ClickHouse with empty tables and an empty Postgres, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        sandbox = servers.start(Path(folder) / "servers")
        try:
            source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
            with with_own_postgres(sandbox) as running:
                yield Source(running, SOURCE_DATABASE), Target(running, "public")
        finally:
            servers.stop(sandbox)


if __name__ == "__main__":
    sys.exit(main())
