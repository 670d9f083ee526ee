"""What does a table cost that is not as the export makes it? Events into one that is partitioned by month, one with indexes,
and one that somebody reads meanwhile, beside the plain one; persons into one that is partitioned by hash.

The tables are made beforehand by their owner, as docs/destinations.md says. Those of events grow by a day in each round, those
of persons are made anew.
"""

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from adbc_driver_postgresql import dbapi

from pg_exports.models import MODELS
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.table import Destination, create_statement
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.bench import dataset, product, ranges
from pg_exports_tests.bench.dataset import DAY
from pg_exports_tests.bench.merges import PERSONS_A_HUMAN
from pg_exports_tests.bench.processes import BenchError, Usage
from pg_exports_tests.bench.product import Result
from pg_exports_tests.bench.report import Section

EVENTS_SHARE, PERSONS_SHARE = 1 / 5, 1 / 5
"""Events of a day, and persons, of `--events`."""

SPREAD_DAYS = 92
"""Of how many days before the events are that come as an import of old ones."""

HASH_PARTITIONS = 8

READER = "bench_reader"
READERS_QUERY = "SELECT event, count(*) FROM {table} GROUP BY event"
SECONDS_ALONE = 3.0
"""How long the reader reads before a load begins, to be compared with."""

MB = 1_000_000


@dataclass(frozen=True)
class Variant:
    """A table of events, or of persons, and who else works with it.

    Attributes:
        title: what it is called in the report.
        model: whose rows it holds.
        partitioned: by month, or persons by hash.
        indexes: what stands behind `CREATE INDEX ON` its table.
        spread: the events are those of an import of old ones.
        read: somebody reads the table meanwhile.
    """

    title: str
    model: str = "events"
    partitioned: bool = False
    indexes: tuple[str, ...] = ()
    spread: bool = False
    read: bool = False

    @property
    def plain(self) -> tuple[str, bool]:
        """Variants that have this in common have the same rows, and are compared."""
        return self.model, self.spread


TWO_BTREES = ("(uuid)", "(team_id, timestamp)")

VARIANTS = (
    Variant("as the export makes it"),
    Variant("by month", partitioned=True),
    Variant("brin on timestamp", indexes=("USING brin (timestamp)",)),
    Variant("hash on uuid", indexes=("USING hash (uuid)",)),
    Variant("btree on uuid", indexes=("(uuid)",)),
    Variant("two btrees", indexes=TWO_BTREES),
    Variant("by month, two btrees", partitioned=True, indexes=TWO_BTREES),
    Variant("a reader", read=True),
    Variant("by month, a reader", partitioned=True, read=True),
    Variant(f"events of {SPREAD_DAYS} days in one interval", spread=True),
    Variant(f"the same, by month, of {SPREAD_DAYS} days", spread=True, partitioned=True),
    Variant("persons, as the export makes it", "persons"),
    Variant(f"persons, {HASH_PARTITIONS} partitions by hash", "persons", partitioned=True),
)


@dataclass(frozen=True)
class Load:
    """One load: rows, what it cost, and the reader's queries a second before it and meanwhile."""

    rows: int
    result: Result
    usage: Usage
    alone: float | None = None
    beside: float | None = None

    @property
    def rows_a_second(self) -> float:
        """From connecting to the commit."""
        return self.rows / self.result.load_seconds


@dataclass
class Table:
    """A variant's table, and what was measured of it.

    Attributes:
        schema: its schema; there is nothing else in it.
        database: ClickHouse's with its rows.
        environment: of its runs.
        first_rows: that it had before the first round.
        loads: one for each round.
        rerun_seconds: of a re-run without changes of the last one.
        index_bytes: at the end.
        partitions: that hold rows, at the end.
    """

    variant: Variant
    schema: str
    database: str
    environment: Mapping[str, str]
    first_rows: int = 0
    loads: list[Load] = field(default_factory=list)
    rerun_seconds: float = 0.0
    index_bytes: int = 0
    partitions: int = 1

    @property
    def rows_a_second(self) -> float:
        """The median."""
        return statistics.median(load.rows_a_second for load in self.loads)

    def times(self, plain: "Table") -> float:
        """A row's time beside that in another table's load of the same round, the median."""
        pairs = zip(self.loads, plain.loads, strict=True)
        return statistics.median(other.rows_a_second / own.rows_a_second for own, other in pairs)

    def row(self, plain: "Table") -> tuple[str, ...]:
        """As a row of the report, beside the table that it is compared with."""
        cpu = statistics.median(1e6 * load.usage.postgres_cpu / load.rows for load in self.loads)
        readers = [_median(load.alone for load in self.loads), _median(load.beside for load in self.loads)]
        return (
            self.variant.title,
            f"{self.partitions}",
            f"{self.rows_a_second:,.0f}",
            f"{self.times(plain):.2f}",
            "" if self.variant.read else f"{cpu:.1f}",
            f"{self.index_bytes / MB:.0f}",
            f"{self.rerun_seconds:.1f}",
            *("" if rate is None else f"{rate:.1f}" for rate in readers),
        )


def measure(sandbox: Sandbox, rounds: int, events: int, variants: Sequence[Variant] = VARIANTS) -> Section:
    """Load into each table in turn, over the rounds; those of events have a first day by then.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: loads of each that are measured.
        events: by which the days' sizes go.
        variants: of the table; each needs the first one with the same rows to be compared with.

    Raises:
        BenchError: a run failed, or a table does not hold what the source has.
    """
    with contextlib.ExitStack() as made:
        databases, start = _databases(sandbox, made, rounds, events)
        reader = made.enter_context(_reader_role(sandbox))
        environment = made.enter_context(product.storage_elsewhere(sandbox))
        tables = [
            Table(variant, made.enter_context(dataset.new_schema(sandbox)), databases[variant.plain], environment)
            for variant in variants
        ]
        for table in tables:
            _create(sandbox, table, start)
            if table.variant.model == "events":
                table.first_rows = _load(sandbox, table, start, 0).rows
        for number in range(1, rounds + 1):
            for table in tables:
                table.loads.append(_load(sandbox, table, start, number, reader))
                sys.stderr.write(
                    f"destinations: {table.variant.title}, run {number} of {rounds}:"
                    f" {table.loads[-1].rows_a_second:,.0f} rows a second\n"
                )
                if number == rounds:
                    _look_at(sandbox, table, start + rounds * DAY)
                elif table.variant.model == "persons":
                    _make_anew(sandbox, table, start)
    return section(tables, rounds)


def section(tables: Sequence[Table], rounds: int) -> Section:
    """What was measured, as a section of the report."""
    plain = {table.variant.plain: table for table in reversed(tables)}
    of_models = {table.variant.model: table for table in tables}
    sizes = [
        f"{statistics.median(load.rows for load in table.loads):,.0f} {model}" for model, table in of_models.items()
    ]
    return Section(
        title="Tables of other kinds",
        header=(
            "table",
            "partitions with rows",
            "rows/s",
            "x plain",
            "Postgres CPU s a million",
            "indexes MB",
            "re-run s",
            "reader's queries/s, alone",
            "during the load",
        ),
        rows=[table.row(plain[table.variant.plain]) for table in tables],
        remarks=[
            f"Medians of {rounds} loads, in turn, each of about {' or '.join(sizes)}. A load of "
            "events is a further day of a table that has one already, and gets one in each round; one of persons fills an "
            "empty table. `x plain` is the time a row takes beside that in the first table with the same rows, round by "
            "round. The rows of each table were counted. `re-run` is one run of the last day without changes.",
            "By month: a partition for each month and a default one. Two btrees: on `uuid` and on `(team_id, timestamp)`. "
            "All indexes are in memory here; one that does not fit there costs more.",
            f"The reader is another role on a connection of its own, which runs `{READERS_QUERY.format(table='events')}` over "
            f"and over; alone for {SECONDS_ALONE:.0f} s before each load. Its CPU cannot be told from the load's.",
            "Dagster's storage is on another server, and counts nowhere. CPU includes what a run without rows takes, 0.1 s.",
            f"Persons by hash: PARTITION BY HASH (distinct_id), {HASH_PARTITIONS} partitions, primary key "
            "(team_id, distinct_id).",
        ],
        holds=True,
    )


def _median(rates: Iterator[float | None] | Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def _databases(
    sandbox: Sandbox, made: contextlib.ExitStack, rounds: int, events: int
) -> tuple[dict[tuple[str, bool], str], datetime]:
    """The sources by what variants have in common, and the first day."""
    normal, spread, people = (made.enter_context(dataset.new_database(sandbox)) for _ in range(3))
    days = rounds + 1
    each = events * EVENTS_SHARE / dataset.TEAM_SHARE
    start, _ = dataset.hours(sandbox, normal, count=24 * days, events=round(days * each))
    dataset.spread(sandbox, normal, spread, days=SPREAD_DAYS)
    dataset.people(sandbox, people, count=max(round(events * PERSONS_SHARE / PERSONS_A_HUMAN), 200))
    return {("events", False): normal, ("events", True): spread, ("persons", False): people}, start


def _create(sandbox: Sandbox, table: Table, start: datetime) -> None:
    """Make a table as its owner would, before the first run; the plain one is left to the export."""
    variant = table.variant
    if not (variant.partitioned or variant.indexes):
        return
    statement = create_statement(Destination(None, table.schema, variant.model), MODELS[variant.model])
    name = quoted(table.schema, variant.model)
    if not variant.partitioned:
        statements = [statement]
    elif variant.model == "events":
        statements = [f'{statement} PARTITION BY RANGE ("timestamp")', *_months(table.schema, start)]
    else:
        statements = [f"{statement} PARTITION BY HASH (distinct_id)", *_hashes(table.schema)]
    statements += [f"CREATE INDEX ON {name} {index}" for index in variant.indexes]
    grant = f"GRANT INSERT, SELECT, UPDATE ON {name} TO {quoted(ROLE)}"
    sandbox.postgres.execute(*statements, grant, database=DATABASE)


def _months(schema: str, start: datetime) -> Iterator[str]:
    """The months from that of the earliest events to the next one, and the default partition."""
    month = (start - timedelta(days=SPREAD_DAYS + 30)).date().replace(day=1)
    while month <= dataset.midnight().date():
        following = (month + timedelta(days=31)).replace(day=1)
        yield _partition(schema, month, following)
        month = following
    yield _partition(schema, month, (month + timedelta(days=31)).replace(day=1))
    yield f"CREATE TABLE {quoted(schema, 'events_default')} PARTITION OF {quoted(schema, 'events')} DEFAULT"


def _partition(schema: str, month: date, following: date) -> str:
    return (
        f"CREATE TABLE {quoted(schema, f'events_{month:%Y_%m}')} PARTITION OF {quoted(schema, 'events')}"
        f" FOR VALUES FROM ('{month} 00:00+00') TO ('{following} 00:00+00')"
    )


def _hashes(schema: str) -> Iterator[str]:
    for number in range(HASH_PARTITIONS):
        yield (
            f"CREATE TABLE {quoted(schema, f'persons_{number}')} PARTITION OF {quoted(schema, 'persons')}"
            f" FOR VALUES WITH (MODULUS {HASH_PARTITIONS}, REMAINDER {number})"
        )


def _make_anew(sandbox: Sandbox, table: Table, start: datetime) -> None:
    """Drop all of a table's schema, its ledger too, and make the table again."""
    sandbox.postgres.execute(f"DROP SCHEMA {quoted(table.schema)} CASCADE", database=DATABASE)
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, table.schema)
    _create(sandbox, table, start)


def _load(sandbox: Sandbox, table: Table, start: datetime, number: int, reader: str | None = None) -> Load:
    """Load a day of events, or all persons, beside the reader where there is one, and count what landed.

    Raises:
        BenchError: the run failed, or the table has more or fewer rows than the source.
    """
    model, name = table.variant.model, quoted(table.schema, table.variant.model)
    # All persons are of the last day.
    day = start + DAY * number if model == "events" else dataset.midnight() - DAY
    sandbox.postgres.execute("CHECKPOINT")
    with contextlib.ExitStack() as reading:
        reads: Reads = []
        began = time.time()
        if table.variant.read and reader:
            reads = reading.enter_context(_reading(sandbox, name, reader))
            began = time.time()
            time.sleep(SECONDS_ALONE)
        result, usage = product.measure_day(
            sandbox, model, table.database, table.schema, day, environment=table.environment
        )
    rows = dataset.rows_of_day(sandbox, table.database, model, day)
    before = sum(load.rows for load in table.loads) + table.first_rows if model == "events" else 0
    ranges.check_landed(sandbox, table.schema, model, before + rows)
    if not reads:
        return Load(rows, result, usage)
    end = result.load_began + result.load_seconds
    return Load(
        rows,
        result,
        usage,
        alone=queries(reads, began, began + SECONDS_ALONE) / SECONDS_ALONE,
        beside=queries(reads, result.load_began, end) / result.load_seconds,
    )


def _look_at(sandbox: Sandbox, table: Table, day: datetime) -> None:
    """A re-run of the last day, and what the table has become."""
    model = table.variant.model
    rerun, _ = product.measure_day(sandbox, model, table.database, table.schema, day, environment=table.environment)
    if rerun.total("rows_inserted") or rerun.total("rows_updated"):
        raise BenchError(f"{table.variant.title}: the re-run wrote rows.")
    table.rerun_seconds = rerun.load_seconds
    [(index_bytes,)] = sandbox.postgres.rows(
        "SELECT sum(pg_indexes_size(oid))::bigint FROM pg_class WHERE relkind = 'r'"
        f" AND relnamespace = '{table.schema}'::regnamespace AND relname NOT LIKE 'pg\\_exports\\_%'",
        DATABASE,
    )
    [(partitions,)] = sandbox.postgres.rows(
        f"SELECT count(DISTINCT tableoid) FROM {quoted(table.schema, model)}", DATABASE
    )
    table.index_bytes, table.partitions = int(str(index_bytes)), int(str(partitions))


Reads = list[tuple[float, float]]
"""When each query of the reader's began and ended, in seconds since 1970."""


def queries(reads: Reads, first: float, last: float) -> float:
    """How many queries ran between two moments, those in part that were under way at one of them."""
    shares = ((min(ended, last) - max(began, first)) / (ended - began) for began, ended in reads)
    return sum(share for share in shares if share > 0)


@contextlib.contextmanager
def _reader_role(sandbox: Sandbox) -> Iterator[str]:
    """The password of a role that may connect, for the block."""
    password = postgres_server.new_password()
    postgres_server.create_role(sandbox.postgres, READER, password)
    try:
        sandbox.postgres.execute(f"GRANT CONNECT ON DATABASE {quoted(DATABASE)} TO {READER}")
        yield password
    finally:
        sandbox.postgres.execute(f"DROP OWNED BY {READER}", f"DROP ROLE {READER}", database=DATABASE)


@contextlib.contextmanager
def _reading(sandbox: Sandbox, table: str, password: str) -> Iterator[Reads]:
    """Have the reader ask the table again and again, for the block."""
    sandbox.postgres.execute(
        f"GRANT USAGE ON SCHEMA {table.partition('.')[0]} TO {READER}",
        f"GRANT SELECT ON {table} TO {READER}",
        database=DATABASE,
    )
    reads: Reads = []
    failures: list[Exception] = []
    ended = threading.Event()
    uri = (
        f"host={sandbox.postgres.host} port={sandbox.postgres.port} dbname={DATABASE} user={READER} password={password}"
        f" sslmode=verify-full sslrootcert='{sandbox.certificates.authority}'"
    )

    def read() -> None:
        try:
            with dbapi.connect(uri, autocommit=True) as connection, connection.cursor() as cursor:
                while not ended.is_set():
                    began = time.time()
                    cursor.execute(READERS_QUERY.format(table=table))
                    cursor.fetchall()
                    reads.append((began, time.time()))
        except dbapi.Error as error:
            failures.append(error)

    thread = threading.Thread(target=read, name="bench reader")
    thread.start()
    try:
        yield reads
    finally:
        ended.set()
        thread.join()
    if failures:
        raise BenchError(f"The reader failed: {failures[0]}")
