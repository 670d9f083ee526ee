"""What do a million rows cost? Of each model: CPU on both sides, the client's memory, WAL, and disk for the table, its
indexes, the journals and the ledger; and what a re-run costs that finds nothing changed.

The sample is smaller or greater than a million, and the figures are scaled; how many rows were loaded is shown. What a run
costs that has no rows is measured, too, and taken off before. Dagster's own storage is on another Postgres here, so that
neither its CPU nor its WAL counts.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pg_exports.postgres import journal, ledger
from pg_exports.postgres.identifiers import literal, quoted
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.bench import dataset, product, ranges
from pg_exports_tests.bench.merges import PERSONS_A_HUMAN
from pg_exports_tests.bench.processes import BenchError, Usage
from pg_exports_tests.bench.product import Result
from pg_exports_tests.bench.report import Section

EVENTS_SHARE, PERSONS_SHARE = 1 / 2, 1 / 5
"""Rows of the two samples, of `--events`. Sessions come from the events', an eighth as many."""

MILLION = 1_000_000
MB = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What one run cost, and what it left on disk; sizes are bytes."""

    result: Result
    usage: Usage
    wal: int
    table: int
    indexes: int
    journals: int
    ledger: int


Figure = Callable[[Cost], float]


@dataclass(frozen=True)
class Footprint:
    """A model: rows of its sample, and what first loads of them and re-runs without changes cost."""

    model: str
    rows: int
    loads: Sequence[Cost]
    reruns: Sequence[Cost]

    def median(self, figure: Figure, *, again: bool) -> float:
        """The median of a figure of the first loads, or of the re-runs."""
        return statistics.median(figure(cost) for cost in (self.reruns if again else self.loads))

    def of_million(self, figure: Figure, nothing: "Footprint", *, again: bool) -> float:
        """The same for a million rows, without what a run takes that has none."""
        beyond = self.median(figure, again=again) - nothing.median(figure, again=again)
        return max(0.0, beyond) * MILLION / self.rows


def measure(
    sandbox: Sandbox, rounds: int, events: int, models: Sequence[str] = ("events", "persons", "sessions")
) -> Section:
    """Load each model and run it again, over the rounds, and take the medians.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: loads of each model.
        events: by which the samples' sizes go.
        models: that are measured.

    Raises:
        BenchError: a run failed, or the table does not hold what the source has.
    """
    with (
        _like_a_server_with_defaults(sandbox),
        product.storage_elsewhere(sandbox) as storage,
        dataset.new_database(sandbox) as of_events,
        dataset.new_database(sandbox) as of_people,
    ):
        start, _ = dataset.day(sandbox, of_events, events=round(events * EVENTS_SHARE / dataset.TEAM_SHARE))
        dataset.people(sandbox, of_people, count=max(round(events * PERSONS_SHARE / PERSONS_A_HUMAN), 200))
        source = {"persons": of_people}
        measured = [
            _footprint(sandbox, storage, rounds, model, source.get(model, of_events), start) for model in models
        ]
        nothing = _footprint(sandbox, storage, rounds, "events", of_events, start - dataset.DAY)
    return section(measured, nothing, rounds)


def section(measured: Sequence[Footprint], nothing: Footprint, rounds: int) -> Section:
    """What was measured of the models and of an interval without rows, as a section of the report."""

    def scaled(title: str, figure: Figure, *, again: bool = False) -> tuple[str, ...]:
        of_models = (one.of_million(figure, nothing, again=again) for one in measured)
        return title, *(f"{value:,.1f}" for value in (*of_models, nothing.median(figure, again=again)))

    each = (*measured, nothing)
    [client, postgres, clickhouse] = CPU
    start_up = statistics.median(cost.usage.client_cpu - cost.result.cpu_seconds for one in each for cost in one.loads)
    return Section(
        title="What a million rows cost",
        header=("", *(one.model for one in measured), "a run without rows"),
        rows=[
            ("rows of the sample", *(f"{one.rows:,}" for one in each)),
            (
                "rows a second, one stream",
                *(f"{one.rows / one.median(_seconds, again=False):,.0f}" for one in measured),
                "",
            ),
            (
                "peak MB of the client",
                *(f"{max(cost.result.peak_bytes for cost in one.loads) / MB:.0f}" for one in each),
            ),
            scaled("CPU s, client", client),
            scaled("CPU s, Postgres", postgres),
            scaled("CPU s, ClickHouse", clickhouse),
            scaled("WAL MB", lambda cost: cost.wal / MB),
            scaled("table MB", lambda cost: cost.table / MB),
            scaled("indexes MB", lambda cost: cost.indexes / MB),
            scaled("journals MB", lambda cost: cost.journals / MB),
            scaled("re-run, seconds", _seconds, again=True),
            scaled("re-run, CPU s of all three", lambda cost: sum(figure(cost) for figure in CPU), again=True),
            scaled("re-run, WAL MB", lambda cost: cost.wal / MB, again=True),
        ],
        remarks=[
            f"Medians of {rounds} (the highest peak): first loads of a day into an empty schema, and re-runs of each without "
            "changes. From `CPU s` on they are scaled from the sample to a million rows; what a run takes that has no "
            "rows was taken off before, and is the last column. MB are millions of bytes.",
            "WAL is `pg_wal_lsn_diff` from a CHECKPOINT before the run to its end, with `full_page_writes` on as servers "
            "come (elsewhere in the bench it is off), `wal_level = replica`, no `wal_compression`. Checkpoints "
            "during a load add page images, to merged models and indexes above all.",
            "Sizes are those after the first load: `pg_table_size` with TOAST, `pg_indexes_size`, and "
            f"`pg_total_relation_size` of `pg_exports_keys`. The ledger has {_ledger_bytes(each) / 1000:.0f} kB with one "
            "interval in it, index included. A merge has its rows on disk a second time, in an unlogged staging table, "
            "until it commits.",
            f"Each process takes {start_up:.1f} CPU s more of the client to start (imports, Dagster's storage). "
            "That storage is on another server here, and counts nowhere.",
        ],
        holds=True,
    )


CPU: tuple[Figure, ...] = (
    lambda cost: cost.result.cpu_seconds,
    lambda cost: cost.usage.postgres_cpu,
    lambda cost: cost.usage.clickhouse_cpu,
)
"""CPU seconds of the client's run, of Postgres, of ClickHouse."""


def _seconds(cost: Cost) -> float:
    return cost.result.load_seconds


def _ledger_bytes(measured: Sequence[Footprint]) -> int:
    return max(cost.ledger for one in measured for cost in one.loads)


def _footprint(
    sandbox: Sandbox, storage: Mapping[str, str], rounds: int, model: str, database: str, start: datetime
) -> Footprint:
    rows = dataset.rows_of_day(sandbox, database, model, start)
    loads, reruns = [], []
    for number in range(rounds):
        with dataset.new_schema(sandbox) as schema:
            loads.append(_cost(sandbox, storage, model, database, schema, start))
            ranges.check_landed(sandbox, schema, model, rows)
            reruns.append(_cost(sandbox, storage, model, database, schema, start))
            unchanged = int(reruns[-1].result.total("rows_unchanged"))
            if unchanged != rows:
                raise BenchError(f"The re-run found {unchanged:,} of {rows:,} {model} unchanged.")
        sys.stderr.write(
            f"footprint: {rows:,} {model}, {number + 1} of {rounds}: {loads[-1].result.load_seconds:.1f} s,"
            f" {loads[-1].wal / MB:.0f} MB of WAL; again {reruns[-1].result.load_seconds:.1f} s,"
            f" {reruns[-1].wal / MB:.1f} MB\n"
        )
    return Footprint(model, rows, loads, reruns)


def _cost(
    sandbox: Sandbox, storage: Mapping[str, str], model: str, database: str, schema: str, start: datetime
) -> Cost:
    """One run after a CHECKPOINT."""
    sandbox.postgres.execute("CHECKPOINT")
    before = _written_wal(sandbox)
    result, usage = product.measure_day(sandbox, model, database, schema, start, environment=storage)
    wal = _written_wal(sandbox) - before
    table, indexes = (_size(sandbox, function, schema, model) for function in ("pg_table_size", "pg_indexes_size"))
    journals, of_ledger = (
        _size(sandbox, "pg_total_relation_size", schema, name) for name in (journal.TABLE, ledger.TABLE)
    )
    return Cost(result, usage, wal, table, indexes, journals, of_ledger)


def _written_wal(sandbox: Sandbox) -> int:
    """Bytes of WAL that Postgres has written since it was made."""
    [(written,)] = sandbox.postgres.rows("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
    return int(str(written))


def _size(sandbox: Sandbox, function: str, schema: str, table: str) -> int:
    [(size,)] = sandbox.postgres.rows(f"SELECT {function}({literal(quoted(schema, table))}::regclass)", DATABASE)
    return int(str(size))


@contextlib.contextmanager
def _like_a_server_with_defaults(sandbox: Sandbox) -> Iterator[None]:
    """Postgres writes whole pages after a checkpoint, for the block. The sandbox's has that off, as it is disposable."""
    [(before,)] = sandbox.postgres.rows("SELECT current_setting('full_page_writes')")
    sandbox.postgres.execute("ALTER SYSTEM SET full_page_writes = on", "SELECT pg_reload_conf()")
    try:
        yield
    finally:
        sandbox.postgres.execute(f"ALTER SYSTEM SET full_page_writes = {before}", "SELECT pg_reload_conf()")
