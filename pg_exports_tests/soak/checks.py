"""What must be true of the soak's destination: after each round, whatever struck it, and at the end.

What should be there is read from ClickHouse by the models' own queries. Here is nothing that writes.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pg_exports.models import Model, Selection
from pg_exports.postgres import registry
from pg_exports.postgres import table as tables
from pg_exports.postgres.table import DestinationTable
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import TEAM, Source, Target
from pg_exports_tests.models.comparison import Row, comparable, differences, landed_rows
from pg_exports_tests.soak.exports import DAY, EXPORTS, export, model, stretches
from pg_exports_tests.soak.rows import LATE, REFUSED
from pg_exports_tests.source_rows import HOUR

_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")

Keys = set[Hashable]


@dataclass
class Past:
    """What was done to the tables by another way than by exports.

    Attributes:
        there: the keys of each table's rows before the round.
        deleted: the keys of appended rows that were deleted by hand: they may be missing.
        brought: the keys of appended rows that came from a dump or a copy. If they have changed at the source since, they
            stay as they came: no run knows in which state that was.
    """

    there: dict[str, Keys] = field(default_factory=dict)
    deleted: dict[str, Keys] = field(default_factory=lambda: {name: set() for name in EXPORTS})
    brought: dict[str, Keys] = field(default_factory=lambda: {name: set() for name in EXPORTS})

    def look(self, target: Target) -> None:
        """Keep what is there."""
        self.there = {name: set(keys_there(target, name)) for name in EXPORTS}


def check_round(source: Source, target: Target, past: Past) -> None:
    """An interval is in the ledger with all of its rows, each once, or nothing of it has come.

    Raises:
        AssertionError: with what is too much and what is missing.
    """
    _same("staging tables", target.rows("SELECT relname FROM pg_class WHERE relname LIKE 'pg_exports_staging%'"), [])
    _same("open sessions", target.rows(f"SELECT query FROM pg_stat_activity WHERE usename = '{ROLE}'"), [])
    for name in EXPORTS:
        hours = committed(target, name)
        _check_ledger(target, name)
        _check_rejected(target, name, hours)
        if model(name, target).merge:
            _check_merged(source, target, name, hours, past)
        else:
            _check_appended(source, target, name, hours, past)


def check_all(source: Source, target: Target, hours: Sequence[datetime], past: Past) -> dict[str, int]:
    """Every interval was exported, and what is there is what the source has, value for value. Gives the rows by export.

    Raises:
        AssertionError: with what is too much and what is missing.
    """
    check_round(source, target, past)
    for name in EXPORTS:
        _same(f"the intervals of {name} in the ledger", committed(target, name), hours)
        columns = _columns(model(name, target))
        there, wanted = landed_rows(target, name, columns), _good_rows(source, target, name, hours)
        lacking = [] if model(name, target).merge else Counter(wanted) - Counter(there)
        gone = [row for row in lacking if _may_be_missing(name, row, columns, there, past)]
        old = [] if model(name, target).merge else Counter(there) - Counter(wanted)
        kept = [row for row in old if _key(name, row, columns) in past.brought[name]]
        _same(f"the rows of {name}", (Counter(there) - Counter(kept) + Counter(gone)).elements(), wanted)
        rejected = target.rows(_REJECTED.format(table=name))
        bad = [row for row in _rows_at_source(source, target, name, hours) if _is_refused(row, columns)]
        _same(
            f"the rejected rows of {name}",
            (key for (key,) in rejected),
            (str(_value(row, columns, "distinct_id")) for row in bad),
        )
    return {name: target.count(name) for name in EXPORTS}


_REJECTED = (
    "SELECT key ->> 'distinct_id' FROM pg_exports_rejected WHERE destination = '{table}' AND resolved_at IS NULL"
)


def committed(target: Target, name: str) -> list[datetime]:
    """The beginnings of the day's intervals that the table has, by the ledger."""
    table = known_table(target, name)
    if table is None:
        return []
    rows = target.rows(
        f"SELECT interval_start FROM pg_exports_ledger WHERE {_of(table)} AND interval_start >= '{DAY}' ORDER BY 1"
    )
    return [start for (start,) in rows]


def known_table(target: Target, name: str) -> DestinationTable | None:
    """The table with its numbers in the ledger; None if no run has met it as it is now."""
    mine = export(name, target)
    with target.resource().session() as session, session.transaction():
        return registry.look_up(session, tables.inspect(session, mine.destination, mine.model_with_columns))


def keys_there(target: Target, name: str, table: str | None = None) -> Iterator[Hashable]:
    """The key of each row of an export's table, or of a part of it."""
    columns = _columns(model(name, target))
    for row in landed_rows(target, table or name, columns):
        yield _key(name, row, columns)


def _of(table: DestinationTable) -> str:
    destination, oid, filenode = table.identity
    leaves = ",".join(map(str, table.partition_filenodes))
    return (
        f"destination = '{destination}' AND table_oid = {oid} AND table_filenode = {filenode}"
        f" AND partition_filenodes <@ '{{{leaves}}}'"
    )


def _check_ledger(target: Target, name: str) -> None:
    table = known_table(target, name)
    if table is None:
        return
    wrong = target.rows(
        f"""
        SELECT * FROM pg_exports_ledger
        WHERE {_of(table)} AND (
            rows_missing <> 0
            OR rows_at_source <> rows_inserted + rows_updated + rows_unchanged + rows_rejected
            OR split_part(fingerprint, ':', 1)::bigint <> rows_at_source
        )
        """
    )
    _same(f"rows of the ledger that contradict themselves, for {name}", wrong, [])


def _check_rejected(target: Target, name: str, hours: Sequence[datetime]) -> None:
    """Of the intervals that were exported. What is not read any more stays unresolved."""
    kept = target.rows(
        "SELECT interval_start, count(*) FROM pg_exports_rejected"
        f" WHERE destination = '{name}' AND resolved_at IS NULL GROUP BY 1"
    )
    table = known_table(target, name)
    counted = target.rows(
        f"SELECT interval_start, rows_rejected FROM pg_exports_ledger WHERE {_of(table)} AND rows_rejected > 0"
        if table
        else "SELECT NULL, NULL WHERE false"
    )
    _same(f"rejected rows of {name} by interval", [row for row in kept if row[0] in hours], counted)


def _check_appended(source: Source, target: Target, name: str, hours: Sequence[datetime], past: Past) -> None:
    columns = _columns(model(name, target))
    there = Counter(landed_rows(target, name, columns))
    wanted = Counter(_good_rows(source, target, name, hours))
    missing = [row for row in wanted - there if not _may_be_missing(name, row, columns, there, past)]
    _same(f"the rows of {name} that are missing", [], missing)
    others = list((there - wanted).elements())
    doubled = [
        row for row in others if _hour(row, columns) in hours and _key(name, row, columns) not in past.brought[name]
    ]
    _same(f"the rows of {name} that are there too often, or in an old state", doubled, [])
    came = [row for row in others if _key(name, row, columns) not in past.there[name]]
    _same(f"the rows of {name} in intervals that are not in the ledger", came, [])
    again = [key for key, count in Counter(_key(name, row, columns) for row in there.elements()).items() if count > 1]
    _same(f"the keys of {name} that are there twice", again, [])


def _may_be_missing(name: str, row: Row, columns: Mapping[str, str], there: Iterable[Row], past: Past) -> bool:
    """Whether an appended row was deleted by hand, or is there from another interval: once rows have come into a table by
    another way, the table is asked, and an event that stands in two intervals lands once.
    """
    identity = _identity(name, row, columns)
    return _key(name, row, columns) in past.deleted[name] or any(
        _identity(name, other, columns) == identity for other in there
    )


def _check_merged(source: Source, target: Target, name: str, hours: Sequence[datetime], past: Past) -> None:
    """By their keys: a row may have its latest state in an interval that is still to come."""
    columns = _columns(model(name, target))
    wanted = {_key(name, row, columns) for row in _good_rows(source, target, name, hours)}
    there = landed_rows(target, name, columns)
    _same(f"the keys of {name} that are missing", [], wanted - {_key(name, row, columns) for row in there})
    came = [
        row
        for row in there
        if not str(_value(row, columns, "distinct_id")).startswith(LATE)
        and _key(name, row, columns) not in wanted | past.there[name]
    ]
    _same(f"the rows of {name} in intervals that are not in the ledger", came, [])


def _columns(of: Model) -> dict[str, str]:
    """Those that a table has that the export made, and the one that was added."""
    return {
        column.name: column.postgres_type
        for column in of.columns
        if not column.optional or column.name == "inserted_at"
    }


_KEYS: Mapping[str, tuple[str, ...]] = {
    "events": ("uuid", "event", "distinct_id"),
    "persons": ("distinct_id",),
    "sessions": ("session_id",),
    "clicks": ("page", "number"),
    "visits": ("id",),
}


def _key(name: str, row: Row, columns: Mapping[str, str]) -> Hashable:
    """What tells a row from others of its interval."""
    key = _identity(name, row, columns)
    return (*key, _hour(row, columns)) if "inserted_at" in columns else key


def _identity(name: str, row: Row, columns: Mapping[str, str]) -> tuple[Hashable, ...]:
    return tuple(_value(row, columns, column) for column in _KEYS[name])


def _hour(row: Row, columns: Mapping[str, str]) -> datetime:
    moment: datetime = _value(row, columns, "inserted_at")
    return moment.replace(minute=0, second=0, microsecond=0)


def _good_rows(source: Source, target: Target, name: str, hours: Sequence[datetime]) -> list[Row]:
    """The rows that should be there if these hours were exported."""
    columns = _columns(model(name, target))
    rows = _rows_at_source(source, target, name, hours)
    return [comparable(row, columns) for row in rows if not _is_refused(row, columns)]


def _rows_at_source(
    source: Source, target: Target, name: str, hours: Sequence[datetime]
) -> Iterator[tuple[Hashable, ...]]:
    """Rows by the model's own query; an appended one may be there once in each interval."""
    of = model(name, target)
    columns = _columns(of)
    spans = stretches(list(hours)) if of.merge else [(hour, hour + HOUR) for hour in hours]
    seen: Keys = set()
    for start, end in spans:
        query = of.query(Selection(TEAM, start, end))
        with source.resource().frames(query, of, log_comment="soak") as frames:
            for frame in frames:
                for values in frame.select(list(columns)).iter_rows():
                    row = tuple(_repaired(value) for value in values)
                    # A person that was touched in two stretches is there once.
                    if not of.merge or (key := _key(name, row, columns)) not in seen:
                        if of.merge:
                            seen.add(key)
                        yield row


def _repaired(value: Any) -> Any:
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    return _ESCAPED_NUL.sub(r"\1\\ufffd", value).replace("\0", "\ufffd") if isinstance(value, str) else value


def _is_refused(row: Row, columns: Mapping[str, str]) -> bool:
    return "distinct_id" in columns and str(_value(row, columns, "distinct_id")).startswith(REFUSED)


def _value(row: Row, columns: Mapping[str, str], name: str) -> Any:
    return row[list(columns).index(name)]


def _same(what: str, there: Iterable[Any], wanted: Iterable[Any]) -> None:
    found = differences(there, wanted)
    assert not found, f"{what}: {found}"
