"""Whether a range of an export's intervals is in Postgres as ClickHouse has it, and the job that finds out.

For each interval four things are compared: the rows that ClickHouse has now, what the ledger says, the rows that the table
really holds (looked up by their keys), and what Dagster shows. Each difference is named with what repairs it. Nothing is
written. `python -m pg_exports.verify` runs the job from the command line.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import dagster as dg
from dagster._check import CheckError

from pg_exports.clickhouse import ClickHouseResource
from pg_exports.connection_check import EXPORT, REASON
from pg_exports.interval import Deduplicate, Interval, OnBadRows
from pg_exports.models import Model
from pg_exports.partitions import intervals, recent
from pg_exports.postgres import PostgresResource, comparison, keys
from pg_exports.postgres.comparison import Compared, Sides, Twice
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination, DestinationTable
from pg_exports.postgres.types import TEXT_TYPES
from pg_exports.reader import Reader

VERIFICATION = "verification"
"""The value of `REASON`, a tag of the jobs and so of their runs."""

RANGES = "ranges"
"""Key of a run's metadata: the table of what was found, with the fields of `Range`."""

DAYS = timedelta(days=2)
"""The intervals of so many days are compared if a run names none."""

ON_THEIR_WAY = timedelta(minutes=10)
"""Of these, none that ended less long ago: its run may be under way."""

ROWS_AT_ONCE, INTERVALS_AT_ONCE = 1_000_000, 720
"""Rows, and intervals, of one pass over the table. An interval with more rows has a pass to itself."""

MOST_KEYS = 100
"""How many rows that stand more than once are in the statement that deletes the needless ones."""

ERASED = 'docs/operations.md, "Rows that were erased at the source"'
"""Where the repair is described that an export cannot do."""

Kind = Literal[
    "as it should be",
    "not exported",
    "not in the ledger",
    "not shown",
    "lost",
    "late",
    "older",
    "changed",
    "twice",
    "erased",
]

_SAID: Mapping[Kind, str] = {
    "as it should be": "as it should be: {rows} rows",
    "not exported": "not exported: neither the ledger nor Dagster has it; ClickHouse has {rows} rows",
    "not in the ledger": "Dagster shows it as materialised, and the ledger does not have it; ClickHouse has {rows} rows",
    "not shown": "the ledger has it, and Dagster does not show it as materialised ({rows} rows)",
    "lost": "{rows} rows that were exported are not in the table",
    "late": "{rows} rows became visible or changed in ClickHouse after the last run",
    "older": "{rows} rows are in the table in an older version than was exported",
    "changed": "some of the {rows} rows have changed in ClickHouse since the last run",
    "twice": "{rows} rows stand in the table more often than they were exported",
    "erased": "{rows} rows that were exported are not in ClickHouse any more, or not selected by the export's filters",
}


# Plain texts: in a `dg.Config` a launch could say `{env: NAME}`, and read the variable in the error about it.
_CONFIG = {
    "first": dg.Field(str, default_value="", description="Partition key; empty for the last two days."),
    "last": dg.Field(str, default_value="", description="Partition key, inclusive; that of `first` by default."),
}


@dataclass(frozen=True)
class Subject:
    """An export, as it is compared.

    Attributes:
        export: its name.
        model, team_id, destination: what it exports, and where to.
        on_bad_rows, deduplicate: its settings.
        partitions: its intervals.
        source: gives what reads ClickHouse, by the connection, what each query has as a comment, and the log.
    """

    export: str
    model: Model
    team_id: int
    destination: Destination
    on_bad_rows: OnBadRows
    deduplicate: Deduplicate
    partitions: dg.TimeWindowPartitionsDefinition
    source: Callable[[ClickHouseResource, dict[str, str], Any], Reader]


@dataclass(frozen=True)
class Range:
    """Intervals that follow each other and have the same difference, or none.

    Attributes:
        first, last: their partition keys, the last one inclusive.
        intervals: how many they are.
        difference: what differs; None if nothing does.
        at_source, in_ledger, in_table: their rows in ClickHouse now, as the ledger has them, and how many of the former the
            table holds (None if it cannot be asked).
        repair: what to do; empty if there is nothing.
    """

    first: str
    last: str
    intervals: int
    difference: str | None
    at_source: int
    in_ledger: int
    in_table: int | None
    repair: str

    def __str__(self) -> str:
        keys = self.first if self.intervals == 1 else f"{self.first}...{self.last}, {self.intervals} intervals"
        said = self.difference or _SAID["as it should be"].format(rows=f"{self.at_source:,}")
        return f"{keys}: {said}.{f' {self.repair}' if self.repair else ''}"


def job(
    subject: Subject, postgres: Callable[[Any], PostgresResource], resource_keys: frozenset[str]
) -> dg.JobDefinition:
    """The job `<export>_verify`. Its run fails if anything differs; what was found is in the log and in its metadata.

    It is in no pool, so that it need not wait for exports.

    Args:
        subject: what is compared.
        postgres: the connection, among the resources of the job.
        resource_keys: which these are.
    """

    # Dagster wants names of ops that differ from those of jobs.
    @dg.op(
        name=f"{subject.export}_verification",
        description=f"Compares ClickHouse, the ledger, the table and Dagster for {subject.export}, and writes nothing.",
        required_resource_keys=set(resource_keys),
        config_schema=_CONFIG,
    )
    def verify(context: dg.OpExecutionContext) -> None:
        found: list[Range] = []
        some = _intervals(subject.partitions, **context.op_config)
        if not some:
            context.log.info("No interval is over yet.")
            return
        exports = _exports(context)
        connection = postgres(context.resources)
        source = subject.source(context.resources.clickhouse, {"run_id": context.run_id}, context.log)
        with connection.session(subject.destination.database, context.log) as session:
            table = comparison.recognised(session, subject.destination, subject.model, subject.team_id)
            sides = Sides(session, table, subject.export, exports, subject.team_id, source, subject.on_bad_rows)
            for line in _verified(subject, sides, some, context.instance, context.log.info):
                say = context.log.warning if line.difference else context.log.info
                say(str(line))
                found.append(line)
        metadata = {RANGES: dg.MetadataValue.table([dg.TableRecord(asdict(line)) for line in found])}
        differences = [str(line) for line in found if line.difference]
        if differences:
            raise dg.Failure("\n\n".join(differences), metadata, allow_retries=False)
        context.log.info("Nothing differs.")
        context.add_output_metadata(metadata)

    @dg.job(
        name=f"{subject.export}_verify",
        description=f"Compares ClickHouse, the ledger, the table and Dagster, interval by interval of {subject.export}.",
        tags={REASON: VERIFICATION, EXPORT: subject.export},
        executor_def=dg.in_process_executor,
    )
    def verification() -> None:
        verify()

    return verification


def _exports(context: dg.OpExecutionContext) -> frozenset[str]:
    """The names of the deployment's exports; none if the job runs outside a code location, as that of the command does."""
    with contextlib.suppress(CheckError):
        return frozenset(key.to_user_string() for key in context.repository_def.asset_graph.get_all_asset_keys())
    return frozenset()


def _intervals(partitions: dg.TimeWindowPartitionsDefinition, first: str, last: str) -> Sequence[Interval]:
    now = datetime.now(UTC)
    if first or last:
        return intervals(partitions, first or last, last or first, now)
    due = now - ON_THEIR_WAY
    return recent(partitions, 1, due, due - DAYS)


def _verified(
    subject: Subject,
    sides: Sides,
    some: Sequence[Interval],
    instance: dg.DagsterInstance,
    say: Callable[[str], None],
) -> Iterator[Range]:
    """What was found, oldest first. The cost is said before it begins."""
    entries = sides.entries(Interval("", some[0].start, some[-1].end))
    unknown = [interval for interval in some if (interval.start, interval.end) not in entries]
    sizes = {interval: entry.rows for interval in some if (entry := entries.get((interval.start, interval.end)))}
    for together in _following(unknown):
        fingerprints = sides.source.fingerprints(together, of_latest=bool(subject.model.merge))
        sizes |= {interval: each.rows for interval, each in zip(together, fingerprints, strict=True)}
    chunks = list(_chunks(some, sizes))
    say(_cost(subject, sides, some, sum(entry.rows for entry in entries.values()), len(chunks)))
    shown = instance.get_materialized_partitions(dg.AssetKey(subject.export))
    compared: dict[Interval, Compared] = {}
    twice: list[Twice] = []
    for chunk in chunks:
        found = sides.compare(chunk)
        compared |= found.intervals
        twice += found.twice
        if len(chunks) > 1:
            say(f"Compared up to {chunk[-1].partition_key} ...")
    needless = _needless(twice, {} if subject.deduplicate == "table" else sides.explained(twice))
    counts = Counter(row.interval for row, _ in needless)
    kinds = {
        interval: _kinds(subject.model, each, counts[interval], is_shown=interval.partition_key in shown)
        for interval, each in compared.items()
    }
    for kind, repair, group in _grouped(subject, some, kinds, compared):
        mine = [(row, keep) for row, keep in needless if row.interval in set(group)]
        if kind == "twice" and sides.table:
            repair = _statement(sides.table, mine)
        yield _range(kind, repair, group, compared, kinds)


def _following(some: Sequence[Interval]) -> Iterator[Sequence[Interval]]:
    """The intervals in lists of those that follow each other."""
    together: list[Interval] = []
    for interval in some:
        if together and (together[-1].end != interval.start or len(together) == INTERVALS_AT_ONCE):
            yield together
            together = []
        together.append(interval)
    if together:
        yield together


def _chunks(some: Sequence[Interval], sizes: Mapping[Interval, int]) -> Iterator[Sequence[Interval]]:
    """The intervals of one pass each."""
    for following in _following(some):
        chunk: list[Interval] = []
        rows = 0
        for interval in following:
            if chunk and rows + sizes[interval] > ROWS_AT_ONCE:
                yield chunk
                chunk, rows = [], 0
            chunk.append(interval)
            rows += sizes[interval]
        yield chunk


def _cost(subject: Subject, sides: Sides, some: Sequence[Interval], rows: int, passes: int) -> str:
    said = (
        f"Comparing {subject.export} {some[0].partition_key}...{some[-1].partition_key}: {len(some)} intervals with "
        f"{rows:,} rows in the ledger. Nothing is written."
    )
    table = sides.table
    if table is None:
        return f"{said} {subject.destination.qualified} is not there, or no export has written to its schema."
    if table.why_not_asked:
        return f"{said} Rows are not looked up in the table. {table.why_not_asked}"
    size, index = _size(sides.session, table)
    said = f"{said} {table.qualified} has {size}, and is asked {passes} times, for up to {ROWS_AT_ONCE:,} keys each"
    if index is None:
        return f"{said}; it has an index for that."
    return f"{said}; without an index for keys it is read as a whole each time. If that takes long: {index};"


def _size(session: Session, table: DestinationTable) -> tuple[str, str | None]:
    """How large the table is, and the index that it lacks."""
    with comparison.undone(session):
        [(size,)] = session.rows(
            """
            SELECT pg_size_pretty(coalesce(sum(pg_total_relation_size(file)), 0))
            FROM unnest($1::text::oid[]) AS file
            """,
            "{" + ",".join(map(str, table.files)) + "}",
            doing="reading the size of the table",
        )
        return str(size), keys.missing_index(session, table.qualified, table.model, table.oid)
    raise AssertionError


def _needless(twice: Sequence[Twice], explained: Mapping[int, int]) -> list[tuple[Twice, int]]:
    """The rows that stand more often than they were exported, and how often they were."""
    known = [(row, max(1, explained.get(row.identity, 0))) for row in twice]
    return [(row, times) for row, times in known if row.copies > times]


def _kinds(model: Model, each: Compared, twice: int, *, is_shown: bool) -> dict[Kind, int]:
    """What differs in an interval, with the number of rows that it is about."""
    found: dict[Kind, int] = {}
    rows, entry = each.fingerprint.rows, each.entry
    if entry is None:
        found["not in the ledger" if is_shown else "not exported"] = rows
    else:
        if not is_shown:
            found["not shown"] = rows
        counted: Mapping[Kind, int] = {
            "lost": each.lost,
            "late": each.unread,
            "older": each.older,
            "erased": each.erased,
        }
        found |= {kind: count for kind, count in counted.items() if count}
        # A row that was sent again has another state under its old identity.
        is_same = not entry.fingerprint or each.fingerprint.may_be(entry.fingerprint)
        if not (model.merge or is_same or each.unread or each.erased):
            found["changed"] = rows
    if twice:
        found["twice"] = twice
    return found or {"as it should be": rows}


def _grouped(
    subject: Subject,
    some: Sequence[Interval],
    kinds: Mapping[Interval, Mapping[Kind, int]],
    compared: Mapping[Interval, Compared],
) -> Iterator[tuple[Kind, str, Sequence[Interval]]]:
    """The intervals that follow each other and have a kind in common, with what repairs it; the oldest first."""
    groups: list[tuple[Kind, str, Sequence[Interval]]] = []
    for kind in _SAID:
        for has_it, group in itertools.groupby(some, key=lambda interval: kind in kinds[interval]):
            members = list(group)
            if has_it:
                present = [compared[interval].present for interval in members]
                groups.append((kind, _repair(subject, kind, members, present), members))
    yield from sorted(groups, key=lambda found: found[2][0].start)


def _repair(subject: Subject, kind: Kind, group: Sequence[Interval], present: Sequence[int | None]) -> str:
    if kind in ("as it should be", "twice"):
        return ""
    if kind == "erased":
        return f"If they are to go here, too: {ERASED}."
    command = f"make backfill EXPORT={subject.export} FROM={group[0].partition_key} TO={group[-1].partition_key}"
    if kind == "not in the ledger" and None in present:
        return f"Make sure that the table has none of them, as the export cannot find out; then: {command}"
    # What the ledger does not know of, a run would not look for in the table.
    is_unknown = kind in ("not in the ledger", "not exported") and any(present)
    needs_replay = not subject.model.merge and (kind == "lost" or is_unknown)
    return f"{command} REPLAY=1" if needs_replay else command


def _range(
    kind: Kind,
    repair: str,
    group: Sequence[Interval],
    compared: Mapping[Interval, Compared],
    kinds: Mapping[Interval, Mapping[Kind, int]],
) -> Range:
    rows = sum(kinds[interval][kind] for interval in group)
    present = [compared[interval].present for interval in group]
    return Range(
        first=group[0].partition_key,
        last=group[-1].partition_key,
        intervals=len(group),
        difference=None if kind == "as it should be" else _SAID[kind].format(rows=f"{rows:,}"),
        at_source=sum(compared[interval].fingerprint.rows for interval in group),
        in_ledger=sum(entry.rows for interval in group if (entry := compared[interval].entry)),
        in_table=None if None in present else sum(count or 0 for count in present),
        repair=repair,
    )


def _statement(table: DestinationTable, rows: Sequence[tuple[Twice, int]]) -> str:
    """The statement with which the table's owner deletes the copies that no run has brought."""
    columns = {destination.name: destination for _, destination in table.pairs}
    key = [columns[name] for name in table.model.key if name in columns]
    names = [quoted(column.name) for column in key]
    # Texts as texts, as a collation may take different ones for equal; others as values, as their texts differ by session.
    casts = ["text" if column.type in TEXT_TYPES else column.declared for column in key]
    listed = {row.key: times for row, times in rows[:MOST_KEYS]}
    values = ", ".join(
        f"({', '.join(map(_literal, json.loads(values), casts))}, {times})" for values, times in listed.items()
    )
    same = " AND ".join(
        f"d.{name}{'::text' if cast == 'text' else ''} IS NOT DISTINCT FROM t.{name}"
        for name, cast in zip(names, casts, strict=True)
    )
    partition = ", ".join(f"t.{name}" for name in names)
    more = f" These are {MOST_KEYS} of them: compare again afterwards." if len(rows) > MOST_KEYS else ""
    return (
        "No command deletes rows. Run as the table's owner, first with "
        f"`SELECT d.* FROM {table.qualified} AS d, copies AS c` in place of the line with DELETE:{more}\n"
        f"WITH exported ({', '.join(names)}, times) AS (VALUES {values}),\n"
        "copies AS (\n"
        f"    SELECT d.ctid AS place, d.tableoid AS file, t.times,\n"
        f"        row_number() OVER (PARTITION BY {partition} ORDER BY d.tableoid, d.ctid) AS number\n"
        f"    FROM {table.qualified} AS d JOIN exported AS t ON {same}\n"
        ")\n"
        f"DELETE FROM {table.qualified} AS d USING copies AS c\n"
        "WHERE d.ctid = c.place AND d.tableoid = c.file AND c.number > c.times;"
    )


def _literal(value: str | None, type_: str) -> str:
    if value is None:
        return f"NULL::{type_}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"E'{escaped}'::{type_}"
