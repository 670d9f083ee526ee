"""What does a merge cost beside the best SQL that one would write by hand? Persons and sessions into a table that is
empty, one that has all the rows already, and one that has half of them in an older version.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pg_exports.models import MODELS
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.bench import dataset, processes, product, ranges
from pg_exports_tests.bench.processes import BenchError
from pg_exports_tests.bench.product import Result
from pg_exports_tests.bench.report import Section

PERSONS = 300_000
SESSION_EVENTS = 1_000_000
"""Rows of persons, about; and events of the sample from which the sessions are, an eighth as many."""

PERSONS_A_HUMAN = 1.07
"""Distinct_ids of the team, by people of both teams."""

SECONDS_SOURCE = "seconds_source"
"""The figure in a materialisation's metadata that is the wait for ClickHouse: here until all rows are in memory."""

RATIO = 1.25
"""What the merge may take, of what the SQL takes."""

STATES = ("empty", "unchanged", "half updated")

JOINED = (("persons", "unchanged"), ("persons", "half updated"), ("sessions", "unchanged"))
ORDERED = ("empty", "half updated")
"""Where the SQL by hand leaves unchanged rows out first, by a LEFT JOIN, and from which states it writes in the key's order.
What was tried, in seconds for 99,327 persons and for 87,472 sessions, 5,467 of the sample sixteen
times under other ids (2 noisy cores, medians of 3 and of 2; single runs of one statement differ by half and more):

| table before | ON CONFLICT | ordered | LEFT JOIN first | ordered | MERGE |
|---|---|---|---|---|---|
| persons, empty | 0.97 | 0.92 | 1.28 | 1.17 | 1.11 |
| persons, unchanged | 1.24 | 1.20 | 0.72 | 0.70 | 0.92 |
| persons, half updated | 1.71 | 1.41 | 1.73 | 1.31 | 1.48 |
| sessions, empty | 1.69 | 1.68 | 2.36 | 2.07 | 1.85 |
| sessions, unchanged | 2.15 | 1.79 | 1.67 | 1.76 | 1.75 |
| sessions, half updated | 1.79 | 1.59 | 2.22 | 1.69 | 1.65 |

UPDATE and then INSERT ... WHERE NOT EXISTS into a table that was analysed while it was empty
took 3 s for 20,046 persons, and was stopped after five minutes for 99,327.
"""

OLDER = {
    "persons": "person_version = person_version - 1, properties = '{}' WHERE hashtext(distinct_id) % 2 = 0",
    "sessions": "end_timestamp = end_timestamp - interval '1 second', duration = duration - 1,"
    " session_duration = session_duration - 1 WHERE hashtext(session_id) % 2 = 0",
}
"""How half of the rows become an older version."""


@dataclass(frozen=True)
class Subject:
    """A model, its rows of one day in ClickHouse, and the schema with the table and with each of its states."""

    sandbox: Sandbox
    model: str
    database: str
    schema: str
    start: datetime

    @property
    def table(self) -> str:
        return quoted(self.schema, self.model)

    @property
    def key(self) -> tuple[str, ...]:
        return MODELS[self.model].key

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column.name for column in MODELS[self.model].columns if not column.optional)

    def state(self, name: str) -> str:
        """The table that keeps a state."""
        return quoted(self.schema, f"kept {name}")

    def execute(self, *statements: str) -> None:
        """Run statements as the superuser, each in a transaction of its own."""
        self.sandbox.postgres.execute(*statements, database=DATABASE)

    def run_export(self) -> Result:
        """One run of the product's."""
        return product.run_day(self.sandbox, self.model, self.database, self.schema, self.start, read_first=True)

    def run_by_hand(self, state: str, file: Path) -> float:
        """The SQL that is best for a state. Gives its seconds, those of psql's whole process."""
        staging = quoted(self.schema, "staging")
        return psql(
            self.sandbox,
            f"BEGIN;\nCREATE UNLOGGED TABLE {staging} (LIKE {self.table});\n"
            f"\\copy {staging} FROM '{file}' WITH (FORMAT binary)\n"
            f"{statement(self, staging, state)};\nDROP TABLE {staging};\nCOMMIT;\n",
        )


@dataclass(frozen=True)
class Race:
    """What the runs of a model from one state took, in seconds, a value for each round.

    Attributes:
        model, state: what is merged, and the state of the table before each run.
        runs: the product's.
        by_hand: the SQL's.
    """

    model: str
    state: str
    runs: list[Result]
    by_hand: list[float]

    @property
    def seconds(self) -> float:
        """The product's whole run, but for imports."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def source_seconds(self) -> float:
        """How long it read."""
        return statistics.median(run.total(SECONDS_SOURCE) for run in self.runs)

    @property
    def merge_seconds(self) -> float:
        """How long the rest of the interval took, from the rows in memory to the commit."""
        return statistics.median(run.total("seconds") - run.total(SECONDS_SOURCE) for run in self.runs)

    @property
    def sql_seconds(self) -> float:
        """How long the SQL took."""
        return statistics.median(self.by_hand)

    @property
    def ratio(self) -> float:
        """By which the promise is judged."""
        return self.merge_seconds / self.sql_seconds

    @property
    def row(self) -> tuple[str, ...]:
        """The race as a row of the report."""
        seconds = (self.seconds, self.source_seconds, self.merge_seconds, self.sql_seconds, self.ratio)
        return f"{self.model}, {self.state}", *(f"{figure:.2f}" for figure in seconds)


def measure(
    sandbox: Sandbox,
    rounds: int,
    persons: int = PERSONS,
    session_events: int = SESSION_EVENTS,
    states: Sequence[str] = STATES,
) -> Section:
    """Merge in turn by the product and by hand, from each state, and compare the medians.

    Args:
        sandbox: whose servers are used; what is made in them is dropped again.
        rounds: merges of each.
        persons: rows of persons, about. 0 leaves them out.
        session_events: events from which the sessions are. 0 leaves them out.
        states: of the table before a merge.

    Raises:
        BenchError: a run failed, or the table is not what it should be after it.
    """
    races: list[Race] = []
    sizes = []
    for model, size in (("persons", round(persons / PERSONS_A_HUMAN)), ("sessions", session_events)):
        if size:
            rows, of_model = _races(sandbox, rounds, model, size, states)
            sizes.append(f"{rows:,} {model}")
            races += of_model
    slow = [f"{race.model}, {race.state}" for race in races if race.ratio > RATIO]
    return Section(
        title="A merge beside SQL by hand",
        header=("table before", "run s", "reading s", "merge s", "by hand s", "merge / by hand"),
        rows=[race.row for race in races],
        remarks=[
            f"{' and '.join(sizes)}; medians of {rounds}, in turn, from the same state of the table; the results are equal.",
            "By hand: `psql` copies a prebuilt binary file of the same rows into an unlogged table and merges that, by "
            "the statement that is the fastest for the case; it reads nothing from ClickHouse, repairs and records nothing.",
            "The run has all rows in memory before it writes the first: ClickHouse would work on the same cores. What `merge` "
            "counts begins there, and ends with the commit: COPY into a staging table, the merge, the ledger.",
            f"At most {RATIO} times is promised." + (f" **It took more for: {'; '.join(slow)}.**" if slow else ""),
        ],
        holds=not slow,
    )


def _races(sandbox: Sandbox, rounds: int, model: str, size: int, states: Sequence[str]) -> tuple[int, list[Race]]:
    """The rows of a model, and the races from each state."""
    with (
        dataset.new_database(sandbox) as database,
        dataset.new_schema(sandbox) as schema,
        tempfile.TemporaryDirectory() as folder,
    ):
        if model == "persons":
            start, _ = dataset.people(sandbox, database, count=size)
        else:
            start, _ = dataset.day(sandbox, database, events=size)
        subject, file = Subject(sandbox, model, database, schema, start), Path(folder) / model
        rows = prepare(subject, file)
        return rows, [_race(subject, state, rounds, file) for state in states]


def _race(subject: Subject, state: str, rounds: int, file: Path) -> Race:
    race = Race(subject.model, state, [], [])
    for number in range(rounds):
        rebuild(subject, state)
        race.runs.append(subject.run_export())
        check_result(subject)
        rebuild(subject, state)
        race.by_hand.append(subject.run_by_hand(state, file))
        check_result(subject)
        sys.stderr.write(
            f"merges: {subject.model}, {state}, {number + 1} of {rounds}: {race.runs[-1].seconds:.2f} s,"
            f" by hand {race.by_hand[-1]:.2f} s\n"
        )
    return race


def prepare(subject: Subject, file: Path) -> int:
    """Export into an empty schema, keep the states of the table, and write its rows to a binary file. Gives the rows."""
    subject.run_export()
    end = subject.start + dataset.DAY
    rows = ranges.rows_at_source(subject.sandbox, subject.database, subject.model, subject.start, end)
    ranges.check_landed(subject.sandbox, subject.schema, subject.model, rows)
    full, empty, half = (subject.state(name) for name in ("unchanged", "empty", "half updated"))
    subject.execute(
        f"CREATE TABLE {full} AS TABLE {subject.table}",
        f"CREATE TABLE {empty} AS TABLE {subject.table} WITH NO DATA",
        f"CREATE TABLE {half} AS TABLE {subject.table}",
        f"UPDATE {half} SET {OLDER[subject.model]}",
    )
    # In no order, as ClickHouse gives them.
    columns = ", ".join(quoted(name) for name in subject.columns)
    psql(
        subject.sandbox,
        f"\\copy (SELECT {columns} FROM {subject.table} ORDER BY hashtext({quoted(subject.key[-1])}))"
        f" TO '{file}' WITH (FORMAT binary)",
    )
    return rows


def rebuild(subject: Subject, state: str) -> None:
    """Bring the table into a state: no dead rows, known to the planner, nothing left to be written."""
    subject.execute(
        f"TRUNCATE {subject.table}",
        f"INSERT INTO {subject.table} SELECT * FROM {subject.state(state)}",
        f"VACUUM (ANALYZE) {subject.table}",
        "CHECKPOINT",
    )


def check_result(subject: Subject) -> None:
    """Compare the table with what it should be after a merge.

    Raises:
        BenchError: they differ.
    """
    full = subject.state("unchanged")
    [(lacking, surplus)] = subject.sandbox.postgres.rows(
        f"SELECT (SELECT count(*) FROM (TABLE {full} EXCEPT TABLE {subject.table}) AS lacking),"
        f" (SELECT count(*) FROM (TABLE {subject.table} EXCEPT TABLE {full}) AS surplus)",
        DATABASE,
    )
    if lacking or surplus:
        raise BenchError(f"After the merge {subject.model} lacks {lacking} rows and has {surplus} that are wrong.")


def statement(subject: Subject, staging: str, state: str) -> str:
    """The merge that was found the fastest for a state."""
    key, others = subject.key, [name for name in subject.columns if name not in subject.key]
    values = ", ".join(f"{quoted(name)} = {quoted('excluded', name)}" for name in others)
    same = " AND ".join(f"{quoted('d', name)} = {quoted('s', name)}" for name in key)
    join = f"LEFT JOIN {subject.table} AS d ON {same} WHERE {quoted('d', key[0])} IS NULL OR {_newer(subject, 's')}"
    return f"""
        INSERT INTO {subject.table} AS d ({_list(subject.columns)})
        SELECT {_list(subject.columns, "s")}
        FROM {staging} AS s
        {join if (subject.model, state) in JOINED else ""}
        {f"ORDER BY {_list(key, 's')}" if state in ORDERED else ""}
        ON CONFLICT ({_list(key)}) DO UPDATE SET {values} WHERE {_newer(subject, "excluded")}
    """


def _newer(subject: Subject, side: str) -> str:
    """Whether a row replaces the one that is there, `d`; the versions are never NULL here."""
    if subject.model == "persons":
        versions = ("person_distinct_id_version", "person_version")
        return f"({_list(versions, side)}) > ({_list(versions, 'd')})"
    others = [name for name in subject.columns if name not in subject.key]
    return (
        f"({quoted(side, 'end_timestamp')} >= {quoted('d', 'end_timestamp')}"
        f" AND ({_list(others, side)}) IS DISTINCT FROM ({_list(others, 'd')}))"
    )


def _list(names: Sequence[str], side: str = "") -> str:
    return ", ".join(quoted(side, name) if side else quoted(name) for name in names)


def psql(sandbox: Sandbox, script: str) -> float:
    """Run a script as the narrow role over verified TLS. Gives the seconds of the whole process.

    Raises:
        BenchError: a statement failed.
    """
    settings = {
        "host": sandbox.postgres.host,
        "port": str(sandbox.postgres.port),
        "dbname": DATABASE,
        "user": ROLE,
        "sslmode": "verify-full",
        "sslrootcert": str(sandbox.certificates.authority),
    }
    connection = " ".join(f"{name}='{value}'" for name, value in settings.items())
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        program = str(postgres_server.find_binaries() / "psql")
        command = [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", connection, "-f", file.name]
        return processes.run(command, sandbox, {"PGPASSWORD": sandbox.password}).seconds
