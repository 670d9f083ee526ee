"""The soak itself: its rounds, and what holds after each."""

import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pg_exports.sandbox import servers, source_tables
from pg_exports.sandbox.servers import ROLE, SOURCE_DATABASE
from pg_exports_tests.conftest import Source, Target
from pg_exports_tests.faults import eventually, with_own_postgres
from pg_exports_tests.postgres.refusing_pooler import refusing_pooler
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy
from pg_exports_tests.soak import rows
from pg_exports_tests.soak.actions import Owner
from pg_exports_tests.soak.checks import Past, check_all, check_round, committed
from pg_exports_tests.soak.exports import EMPTY, EXPORTS, Day, Ways, export, replay
from pg_exports_tests.soak.faults import Scene, Struck, newly_committed, strike
from pg_exports_tests.soak.plan import READ_TIMEOUT, Round, plan
from pg_exports_tests.soak.processes import End, Process
from pg_exports_tests.test_late_rows import look

TICKS = 6
"""After so many ticks of the sensor no row is late any more."""


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
    stage = Stage(source, target, day, seed)
    stage.prepare()
    summary = Summary()
    for planned in plan(seed, rounds, day):
        stage.play(planned, summary)
    stage.end()
    return summary


class Stage:
    """Both sides, and what has happened to them."""

    def __init__(self, source: Source, target: Target, day: Day, seed: int) -> None:
        self._source, self._target, self._day = source, target, day
        self._past = Past()
        self._dice = random.Random(f"owner {seed}")
        self._owner = Owner(source, target, day, self._past, self._dice, is_partitioned=bool(seed % 2))
        self._cursors: dict[str, str] = {}

    def prepare(self) -> None:
        """Tables made by the exports themselves, a ledger that takes its time, and a day's rows."""
        for name in EXPORTS:
            if not isinstance(EXPORTS[name], str):
                rows.create(self._source, name)
            replay(name, [EMPTY], self._source, self._target)
        # By it the interval of an event is known.
        self._target.execute("ALTER TABLE events ADD COLUMN inserted_at timestamptz", *slow_ledger(0.3))
        self._owner.prepare()
        rows.fill(self._source, self._day)

    def play(self, planned: Round, summary: Summary) -> None:
        """One round, the line that tells of it, and whether all is as it should be."""
        started = time.monotonic()
        done = self._make_room()
        if planned.are_late:
            rows.insert_late(self._source, self._dice.choice(self._day.hours), 2 * planned.number + 1)
        for action in planned.actions:
            done.append(self._owner.act(action))
        self._past.look(self._target)
        struck, ends, committed_each = self._run(planned)
        summary.add(planned.fault, struck, ends)
        runs = "; ".join(
            f"{order} {end}, {count} of {order.intervals} committed"
            for order, end, count in zip(planned.orders, ends, committed_each, strict=True)
        )
        met = f"({struck or 'came too late'})"
        before = ", ".join(done) or "nothing"
        print(f"{planned.number:>3} before: {before}\n    {planned.fault:<17} {met:<36} {runs}", flush=True)
        requested = self.settle()
        check_round(self._source, self._target, self._past)
        self._owner.dump()
        late = ", ".join(f"{count} of {name}" for name, count in requested.items()) or "none"
        print(f"    late intervals: {late}  {time.monotonic() - started:.1f} s", flush=True)

    def _make_room(self) -> list[str]:
        """Empty a table that has most intervals: a run that has nothing to write is no great target."""
        full = [name for name in EXPORTS if len(committed(self._target, name)) > 3 / 4 * len(self._day.hours)]
        for name in full:
            self._owner.empty(name)
        return [f"TRUNCATE {name}" for name in full]

    def _run(self, planned: Round) -> tuple[Struck | None, list[End], list[int]]:
        """The round's runs, struck. Gives what the fault met, and of each run how it ended and what it has committed."""
        source, target = self._source, self._target
        [(began,)] = target.rows("SELECT now()")
        with (
            tcp_proxy(target.sandbox.clickhouse.https_port or 0) as clickhouse,
            refusing_pooler(target.sandbox) as pooler,
            tcp_proxy(pooler.port if planned.fault == "pooler refuses" else target.sandbox.postgres.port) as postgres,
        ):
            ways = Ways(clickhouse.port, postgres.port, READ_TIMEOUT)
            processes = [Process(order, source, target, ways) for order in planned.orders]
            scene = Scene(planned, began, self._day.end, source, target, processes, clickhouse, postgres, pooler)
            struck = strike(scene, self._day)
            ends = [process.end() for process in processes]
        eventually(lambda: not target.rows(f"SELECT FROM pg_stat_activity WHERE usename = '{ROLE}'"))
        return struck, ends, [newly_committed(target, order, began) for order in planned.orders]

    def settle(self) -> Counter[str]:
        """An hour is exported, as each is that ends, and then whatever the sensors request until they request nothing.
        Gives how many intervals they have requested, by export.

        Raises:
            AssertionError: a run failed, or they do not stop.
        """
        requested: Counter[str] = Counter()
        for name in EXPORTS:
            replay(name, [EMPTY], self._source, self._target)
            for _ in range(TICKS):
                hours = self._late(name)
                if not hours:
                    break
                requested[name] += len(hours)
                replay(name, hours, self._source, self._target)
            else:
                raise AssertionError(f"The sensor of {name} requests {hours} again and again.")
        return requested

    def _late(self, name: str) -> list[datetime]:
        """The hours that the sensor requests, which remembers what it saw, and no attempts: it need not wait for the next."""
        tick = look(export(name, self._target), self._source, self._target, self._cursors.get(name))
        self._cursors[name] = json.dumps(json.loads(tick.cursor) | {"attempts": {}})
        keys = [str(request.partition_key) for request in tick.run_requests or []]
        return [datetime.strptime(key, "%Y-%m-%d-%H:%M").replace(tzinfo=UTC) for key in keys]

    def end(self) -> None:
        """The intervals that are lacking are exported, then what is late, and both sides are compared; and once more after
        every interval was run again.

        Raises:
            AssertionError: something is wrong.
        """
        hours = self._day.hours
        self._target.execute("DROP FUNCTION take_time CASCADE")
        for name in EXPORTS:
            there = committed(self._target, name)
            replay(name, [hour for hour in hours if hour not in there], self._source, self._target)
        self.settle()
        check_all(self._source, self._target, hours, self._past)
        for name in EXPORTS:
            replay(name, hours, self._source, self._target)
        landed = check_all(self._source, self._target, hours, self._past)
        deleted = sum(len(keys) for keys in self._past.deleted.values())
        print("Equal on both sides: " + ", ".join(f"{count:,} {name}" for name, count in landed.items()))
        print(f"{deleted} rows were deleted by hand.")


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
