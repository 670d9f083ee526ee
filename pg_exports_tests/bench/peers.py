"""The rounds: every contender in turn, again and again, each from the same day of events into an empty schema.

What a contender does is its module's business (`contenders`), whether it did it right `check`'s, and how the figures are
shown `report`'s.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pg_exports.models import Kind, Query, Selection
from pg_exports.models.events import EVENTS
from pg_exports.postgres.identifiers import literal, quoted
from pg_exports.postgres.table import Destination, create_statement
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.bench import check, dataset, product
from pg_exports_tests.bench.contenders.task import TABLE, Task
from pg_exports_tests.bench.processes import BenchError, Usage, run
from pg_exports_tests.bench.report import Bar, Section

CONTENDERS = "pg_exports_tests.bench.contenders"

LIMIT = "limit"
LIMIT_AS_STORED = "limit_as_stored"
PRODUCT = "pg_exports"
PRODUCTS = {PRODUCT: "jsonb", "pg_exports_json": "json", "pg_exports_text": "text"}
"""The product, and what type the events' documents have: some peers make tables in which Postgres reads no JSON."""

CLICKHOUSE_FUNCTION = "clickhouse_function"

TITLES = {
    LIMIT: "the limit: `psql \\copy` of a binary file",
    LIMIT_AS_STORED: "the same, documents as Postgres prints them",
    **dict.fromkeys(PRODUCTS, "pg_exports"),
    CLICKHOUSE_FUNCTION: "ClickHouse's `postgresql()`",
    "dlt_parquet": "dlt, Parquet and ADBC",
    "dlt_default": "dlt, as it comes",
    "python_csv": "Python's csv, psycopg's COPY",
    "polars_adbc": "Polars' `write_database`",
}
"""The contenders, in the order of a round."""

LIMITS = (LIMIT, LIMIT_AS_STORED)
"""No contenders: they have their rows in a file already. The second one's documents are sorted and without repeated keys,
which costs Postgres less than what the source has."""

MOST_TIMES_LIMIT = 1.25
"""What the product may take, of what the limit takes."""

LONGEST_REASON = 240
"""Characters of a failure that are shown in a table."""


@dataclass(frozen=True)
class Round:
    """What one load cost: `seconds` from its first request to its commit, and all of its process."""

    seconds: float
    usage: Usage


@dataclass
class Contender:
    """A contender and its rounds.

    Attributes:
        name: of its module.
        rounds: those that count; none where it failed.
        failure: why it has no time: `cannot: ...`, or `wrong: ...` where the table does not have the source's rows.
        documents: the type that its table has for the events' documents.
    """

    name: str
    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None
    documents: str = ""

    @property
    def title(self) -> str:
        """What a reader knows it by."""
        others = f" (documents as {self.documents.upper()})" if self.documents not in ("", "jsonb") else ""
        return TITLES[self.name] + others

    @property
    def is_ranked(self) -> bool:
        """Whether it has a time."""
        return self.failure is None and bool(self.rounds)

    def median(self, figure: Callable[[Round], float]) -> float:
        """The median of a figure over the rounds."""
        return statistics.median(figure(one) for one in self.rounds)

    @property
    def seconds(self) -> float:
        """The median of the seconds."""
        return self.median(lambda one: one.seconds)


@dataclass(frozen=True)
class Race:
    """All contenders of one sitting, and the number of rows that each had to bring."""

    rows: int
    contenders: list[Contender]

    def named(self, name: str) -> Contender:
        """One of them."""
        return next(contender for contender in self.contenders if contender.name == name)

    @property
    def limit_seconds(self) -> float | None:
        """What the limit took, where it has a time."""
        limit = self.named(LIMIT)
        return limit.seconds if limit.is_ranked else None

    @property
    def ranking(self) -> list[Contender]:
        """The limit, the others from the fastest on, and those without a time."""
        return sorted(
            self.contenders,
            key=lambda one: (
                not one.is_ranked,
                one.name != LIMIT,
                one.name not in LIMITS,
                one.seconds if one.is_ranked else 0,
            ),
        )


def race(sandbox: Sandbox, rounds: int, events: int, say: Callable[[str], None]) -> Race:
    """Let all contenders run.

    Args:
        sandbox: both servers.
        rounds: how often each runs.
        events: about how many each has to bring.
        say: told what each round gave.

    Raises:
        BenchError: nobody could fill the table of which the limit's file is made.
    """
    with dataset.new_database(sandbox) as database:
        start, end = dataset.day(sandbox, database, events=round(events / dataset.TEAM_SHARE))
        query = EVENTS.query(Selection(dataset.TEAM, start, end))
        expected = check.at_source(sandbox, database, query)
        say(f"{expected.rows:,} rows from {start:%Y-%m-%d}, {rounds} rounds")
        contenders = [Contender(name) for name in TITLES]
        _write_files(sandbox, database, query, start, expected)
        for number in range(1, rounds + 1):
            for contender in contenders:
                if not contender.failure:
                    task = _task(sandbox, database, contender.name, query)
                    documents = PRODUCTS.get(contender.name, "") if contender.name != PRODUCT else ""
                    _run(contender, sandbox, task, start, expected, documents)
                    say(f"{number}  {contender.name:<20} {_news(contender)}")
    return Race(expected.rows, contenders)


def _news(contender: Contender) -> str:
    return contender.failure or f"{contender.rounds[-1].seconds:8.2f} s"


def _task(sandbox: Sandbox, database: str, name: str, query: Query) -> Task:
    columns = [column for column in EVENTS.columns if not column.optional]
    schema = f"bench_{name}"
    return Task(
        database=database,
        sql=f"SELECT {', '.join(f'`{column.name}`' for column in columns)} FROM ({query.sql})",
        parameters=query.parameters,
        json_columns=tuple(column.name for column in columns if column.kind is Kind.JSON),
        schema=schema,
        create_table=create_statement(Destination(None, schema, TABLE), EVENTS),
        file=str(sandbox.folder / f"{name}.copy"),
    )


def _write_files(sandbox: Sandbox, database: str, query: Query, start: datetime, expected: check.Expected) -> None:
    """The limits' files, by way of a table that keeps the documents' text as the product brings it: of type JSON.

    Warms up both servers, too.
    """
    first, task = Contender(PRODUCT), _task(sandbox, database, PRODUCT, query)
    _run(first, sandbox, task, start, expected, documents="json")
    if first.failure:
        raise BenchError(f"No table to make the limit's file of: {first.title} {first.failure}")
    table = quoted(task.schema, TABLE)
    # JSONB's binary form is its version, 1, and its text.
    as_jsonb = {name: f"'\\x01'::bytea || convert_to({quoted(name)}::text, 'UTF8')" for name in task.json_columns}
    as_stored = {name: f"{quoted(name)}::jsonb" for name in task.json_columns}
    names = [column.name for column in EVENTS.columns if not column.optional]
    for limit, changed in ((LIMIT, as_jsonb), (LIMIT_AS_STORED, as_stored)):
        columns = ", ".join(changed.get(name, quoted(name)) for name in names)
        file = _task(sandbox, database, limit, query).file
        copy = f"\\copy (SELECT {columns} FROM {table}) TO '{file}' WITH (FORMAT binary)"
        psql = ["psql", "--no-psqlrc", "-d", sandbox.postgres.admin_uri_of(DATABASE), "-c", copy]
        run(psql, sandbox, _environment(sandbox))


def _run(
    contender: Contender, sandbox: Sandbox, task: Task, start: datetime, expected: check.Expected, documents: str = ""
) -> None:
    """One round of one contender: an empty schema, or one with an empty table with `documents` of such a type; the run, and
    the check.
    """
    sandbox.postgres.execute(f"DROP SCHEMA IF EXISTS {quoted(task.schema)} CASCADE", database=DATABASE)
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, task.schema)
    if documents:
        create = task.create_table.replace("JSONB", documents.upper())
        grant = f"GRANT INSERT, SELECT, UPDATE ON {quoted(task.schema, TABLE)} TO {ROLE}"
        sandbox.postgres.execute(create, grant, database=DATABASE)
    sandbox.postgres.execute("CHECKPOINT")
    try:
        usage = run(
            _command(contender.name, task, start),
            sandbox,
            task.environment | _environment(sandbox) | _rights(contender.name, sandbox),
        )
        answer = json.loads(usage.output.splitlines()[-1])
        contender.documents = _type_of_documents(sandbox, task.schema)
        wrong = check.difference(expected, *check.at_destination(sandbox, task.schema, expected))
    except BenchError as error:
        contender.failure = f"cannot: {_reason(str(error))}"
        return
    contender.failure = f"wrong: {wrong}" if wrong else None
    contender.rounds.append(Round(answer.get("load_seconds", answer["seconds"]), usage))


def _command(name: str, task: Task, start: datetime) -> Sequence[str]:
    if name not in PRODUCTS:
        return [sys.executable, "-m", f"{CONTENDERS}.{LIMIT if name in LIMITS else name}"]
    day = f"{start:%Y-%m-%d}"
    return product.arguments("events", task.database, task.schema, interval="day", start=day, first=day)


def _rights(contender: str, sandbox: Sandbox) -> dict[str, str]:
    """As whom a contender asks ClickHouse: what writes from there to Postgres needs more than an export's user has."""
    if contender != CLICKHOUSE_FUNCTION:
        return {}
    return {"CLICKHOUSE_USER": sandbox.clickhouse.user, "CLICKHOUSE_PASSWORD": sandbox.clickhouse.password}


def _environment(sandbox: Sandbox) -> dict[str, str]:
    """For every contender: PostgreSQL's own psql and not Debian's wrapper; dlt keeps to itself."""
    return {
        "PATH": f"{postgres_server.find_binaries()}{os.pathsep}{os.environ['PATH']}",
        "RUNTIME__DLTHUB_TELEMETRY": "false",
        "RUNTIME__LOG_LEVEL": "WARNING",
        "DLT_DATA_DIR": str(sandbox.folder / "dlt"),
    }


def _type_of_documents(sandbox: Sandbox, schema: str) -> str:
    rows = sandbox.postgres.rows(
        "SELECT data_type FROM information_schema.columns WHERE column_name = 'properties'"
        f" AND table_name = {literal(TABLE)} AND table_schema = {literal(schema)}",
        DATABASE,
    )
    return str(rows[0][0]) if rows else ""


def _reason(text: str) -> str:
    """The line of a failure's output that says why: of a traceback the last that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    return (telling or lines)[-1][:LONGEST_REASON]


HEADER = (
    "contender",
    "seconds",
    "x limit",
    "rows/s",
    "whole process s",
    "peak MB",
    "CPU s client",
    "Postgres",
    "ClickHouse",
)


def measure(sandbox: Sandbox, rounds: int, events: int, say: Callable[[str], None]) -> tuple[Section, list[Bar]]:
    """The race as a section of the report, and as the bars of its chart; arguments and errors as those of `race`."""
    ended = race(sandbox, rounds, events, say)
    return section(ended, rounds), bars(ended)


def section(race: Race, rounds: int) -> Section:
    """The race as a table, the fastest first behind the limit, those without a time last."""
    limit = race.limit_seconds
    broken = complaints(race)
    remarks = [
        f"Medians of {rounds} rounds, the contenders in turn, each into an empty schema after a CHECKPOINT. Each is a process"
        " of its own; `seconds` are from its first request to its commit, the `whole process` begins with its imports.",
        "All have the same query and write over TLS with the certificate verified. They read over HTTPS; the limit reads a"
        " file, and ClickHouse sends its rows itself. A time counts only where the table has the source's rows: all are"
        " counted, some hundred compared.",
        f"The seconds of {PRODUCT} are those of its IO manager, from connecting to the commit; what Dagster writes into its"
        " own storage before and after is in the whole process.",
        "The limit's file has the documents as ClickHouse has them. Of documents that Postgres itself has printed, their keys"
        " sorted, it takes the same rows in less time; that is the second line.",
        "Where a peer's table has the documents as JSON or TEXT, Postgres does not read them, which is the better part of its"
        f" work: such a peer is to be compared with {PRODUCT} into a table like that.",
        "The servers' CPU is that of all their processes meanwhile, their memory is not in the table. Postgres does not wait"
        " for its disk (fsync is off).",
        *broken,
    ]
    return Section(
        f"First load of a day of {race.rows:,} events",
        HEADER,
        [_figures(contender, race.rows, limit) for contender in race.ranking],
        remarks,
        not broken,
    )


def complaints(race: Race) -> list[str]:
    """What is not as the product promises: not far above the limit, and no peer faster."""
    limit, own = race.named(LIMIT), race.named(PRODUCT)
    for contender in (limit, own):
        if not contender.is_ranked:
            return [f"**{contender.title} has no time ({contender.failure}).**"]
    found = []
    if own.seconds > MOST_TIMES_LIMIT * limit.seconds:
        found.append(
            f"**{own.title} took {own.seconds / limit.seconds:.2f} x the limit, more than {MOST_TIMES_LIMIT}.**"
        )
    for peer in race.contenders:
        if peer.is_ranked and peer.name not in (*LIMITS, *PRODUCTS):
            like = next((one for one in race.contenders if PRODUCTS.get(one.name) == peer.documents), own)
            if like.is_ranked and peer.seconds < like.seconds:
                found.append(f"**{peer.title} was faster than {like.title}.**")
    return found


def _figures(contender: Contender, rows: int, limit: float | None) -> tuple[str, ...]:
    if not contender.is_ranked:
        return (contender.title, contender.failure or "did not run", *("" for _ in HEADER[2:]))
    seconds = contender.seconds
    return (
        contender.title,
        f"{seconds:.1f}",
        f"{seconds / limit:.2f}" if limit else "",
        f"{rows / seconds:,.0f}",
        f"{contender.median(lambda one: one.usage.seconds):.1f}",
        f"{contender.median(lambda one: one.usage.peak_bytes) / 1_000_000:,.0f}",
        f"{contender.median(lambda one: one.usage.client_cpu):.1f}",
        f"{contender.median(lambda one: one.usage.postgres_cpu):.1f}",
        f"{contender.median(lambda one: one.usage.clickhouse_cpu):.1f}",
    )


def bars(race: Race) -> list[Bar]:
    """The race as bars of a chart, in the table's order; those without a time have none."""
    return [
        Bar(
            contender.title,
            contender.seconds,
            min(one.seconds for one in contender.rounds),
            max(one.seconds for one in contender.rounds),
            own=contender.name in PRODUCTS,
            limit=contender.name in LIMITS,
        )
        for contender in race.ranking
        if contender.is_ranked
    ]
