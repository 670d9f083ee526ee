"""What must be true of the soak's destination: between its rounds, whatever struck them, and at its end.

What should be there is read from ClickHouse by the models' own queries. Here is nothing that writes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pg_exports.models import MODELS, Model, Selection
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import TEAM, Source, Target
from pg_exports_tests.models.comparison import Row, comparable, differences, instant, landed_rows

HOUR = timedelta(hours=1)
DAY = datetime(2026, 3, 10, tzinfo=UTC)
"""The day whose intervals are exported, its first hours or all."""

LATE, REFUSED = "late", "refused"
"""What the distinct_ids of rows begin with that come while exports run, and of rows that no repair makes holdable."""

_COMMITTED = "table_oid = '{table}'::regclass AND table_filenode = pg_relation_filenode('{table}')"
"""Ledger rows of the table that is there now."""

_MAY_LACK = f"match(distinct_id, '^({LATE}|{REFUSED})')"
"""In ClickHouse: rows that may be missing."""

_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def check_between_rounds(source: Source, target: Target) -> None:
    """An interval is in the ledger with all of its rows, each once, or nothing of it is there at all.

    Raises:
        AssertionError: with what is too much and what is missing.
    """
    _check_no_leftovers(target)
    for model in MODELS.values():
        _check_ledger(target, model)
        _check_rejected(target, model)
    _check_events(source, target)
    for model in MODELS.values():
        if model.merge:
            _check_keys(source, target, model)


def check_at_the_end(source: Source, target: Target, hours: Sequence[datetime]) -> dict[str, int]:
    """Every interval was exported, and what is there is what the source has, value for value. Gives the rows by model.

    Raises:
        AssertionError: with what is too much and what is missing.
    """
    check_between_rounds(source, target)
    for model in MODELS.values():
        _same(f"the intervals of {model.name} in the ledger", committed(target, model), hours)
        at_source = list(_rows_at_source(source, model, hours))
        columns = _columns(model)
        _same(
            f"the rows of {model.name}",
            (_by_hour(row, columns) for row in landed_rows(target, model.name, columns)),
            (_by_hour(comparable(row, columns), columns) for row in at_source if not _is_refused(row, columns)),
        )
        _same(
            f"the rejected rows of {model.name}",
            (identity for (identity,) in target.rows(_REJECTED_KEYS.format(table=model.name))),
            (f"{_value(row, columns, 'distinct_id')}" for row in at_source if _is_refused(row, columns)),
        )
    return {model.name: target.count(model.name) for model in MODELS.values()}


_REJECTED_KEYS = (
    "SELECT key ->> 'distinct_id' FROM pg_exports_rejected WHERE destination = '{table}' AND resolved_at IS NULL"
)


def committed(target: Target, model: Model) -> list[datetime]:
    """The beginnings of the day's intervals that the table has, by the ledger."""
    rows = target.rows(
        f"SELECT interval_start FROM pg_exports_ledger WHERE {_COMMITTED.format(table=model.name)}"
        f" AND interval_start >= '{DAY}' ORDER BY 1"
    )
    return [start for (start,) in rows]


def _check_no_leftovers(target: Target) -> None:
    _same("staging tables", target.rows("SELECT relname FROM pg_class WHERE relname LIKE 'pg_exports_staging%'"), [])
    _same("open sessions", target.rows(f"SELECT query FROM pg_stat_activity WHERE usename = '{ROLE}'"), [])


def _check_ledger(target: Target, model: Model) -> None:
    wrong = target.rows(
        f"""
        SELECT * FROM pg_exports_ledger
        WHERE {_COMMITTED.format(table=model.name)} AND (
            rows_missing <> 0
            OR rows_at_source <> rows_inserted + rows_updated + rows_unchanged + rows_rejected
            OR split_part(fingerprint, ':', 1)::bigint <> rows_at_source
        )
        """
    )
    _same(f"rows of the ledger that contradict themselves, for {model.name}", wrong, [])


def _check_rejected(target: Target, model: Model) -> None:
    kept = target.rows(
        "SELECT interval_start, count(*) FROM pg_exports_rejected"
        f" WHERE destination = '{model.name}' AND resolved_at IS NULL GROUP BY 1"
    )
    counted = target.rows(
        "SELECT interval_start, rows_rejected FROM pg_exports_ledger"
        f" WHERE {_COMMITTED.format(table=model.name)} AND rows_rejected > 0"
    )
    _same(f"rejected rows of {model.name} by interval", kept, counted)


def _check_events(source: Source, target: Target) -> None:
    """The events of each interval are as many as its row in the ledger says, and as ClickHouse has."""
    landed = target.rows(
        "SELECT date_trunc('hour', inserted_at), count(*), count(DISTINCT (uuid, event, distinct_id, team_id))"
        " FROM events GROUP BY 1"
    )
    counted = target.rows(
        "SELECT interval_start, rows_at_source - rows_rejected, rows_at_source - rows_rejected FROM pg_exports_ledger"
        f" WHERE {_COMMITTED.format(table='events')} AND rows_at_source > rows_rejected"
    )
    _same("events by interval, all and different ones", landed, counted)
    landed = target.rows(
        "SELECT date_trunc('hour', inserted_at), count(*) FROM events"
        f" WHERE NOT starts_with(distinct_id, '{LATE}') GROUP BY 1"
    )
    at_source = source.rows(
        "SELECT toStartOfHour(coalesce(inserted_at, _timestamp)) AS hour, uniqExact(event, distinct_id, uuid)"
        f" FROM events WHERE team_id = {TEAM} AND NOT {_MAY_LACK} GROUP BY hour"
    )
    hours = set(committed(target, MODELS["events"]))
    expected = [(instant(hour), count) for hour, count in at_source]
    _same("events by interval on both sides", landed, [row for row in expected if row[0] in hours])


def _check_keys(source: Source, target: Target, model: Model) -> None:
    """The keys in a merged table are those of the intervals that were committed. Late rows may be on either side."""
    key = model.key[-1]
    at_source: list[tuple[Any, ...]] = []
    for start, end in _stretches(committed(target, model)):
        query = model.query(Selection(TEAM, start, end))
        at_source += source.rows(
            f"SELECT {key} FROM ({query.sql}) WHERE NOT {_MAY_LACK}",
            query.parameters,
        )
    landed = target.rows(f"SELECT {key} FROM {model.name} WHERE NOT starts_with(distinct_id, '{LATE}')")
    # A person that was touched in two stretches is there once.
    _same(f"the keys of {model.name}", landed, set(at_source))


def _stretches(hours: list[datetime]) -> Iterator[tuple[datetime, datetime]]:
    """Hours that follow each other, together."""
    start = end = None
    for hour in hours:
        if hour != end:
            if start and end:
                yield start, end
            start = hour
        end = hour + HOUR
    if start and end:
        yield start, end


def _columns(model: Model) -> dict[str, str]:
    """Those that a table has that the export made, and the one that was added."""
    return {
        column.name: column.postgres_type
        for column in model.columns
        if not column.optional or column.name == "inserted_at"
    }


def _rows_at_source(source: Source, model: Model, hours: Sequence[datetime]) -> Iterator[tuple[Any, ...]]:
    """Rows by the model's own query; an appended one may be there once in each interval."""
    spans = [(hours[0], hours[-1] + HOUR)] if model.merge else [(hour, hour + HOUR) for hour in hours]
    columns = _columns(model)
    for start, end in spans:
        query = model.query(Selection(TEAM, start, end))
        with source.resource().frames(query, model, log_comment="soak") as frames:
            for frame in frames:
                for row in frame.select(list(columns)).iter_rows():
                    yield tuple(_repaired(value) for value in row)


def _repaired(value: Any) -> Any:
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    return _ESCAPED_NUL.sub(r"\1\\ufffd", value).replace("\0", "\ufffd") if isinstance(value, str) else value


def _by_hour(row: Row, columns: dict[str, str]) -> Row:
    """Of an event that the source has twice in an interval one lands, the first or the second."""
    return tuple(
        value.replace(minute=0, second=0, microsecond=0)
        if name == "inserted_at" and isinstance(value, datetime)
        else value
        for name, value in zip(columns, row, strict=True)
    )


def _is_refused(row: tuple[Any, ...], columns: dict[str, str]) -> bool:
    return str(_value(row, columns, "distinct_id")).startswith(REFUSED)


def _value(row: tuple[Any, ...], columns: dict[str, str], name: str) -> Any:
    return row[list(columns).index(name)]


def _same(what: str, there: Iterable[Any], wanted: Iterable[Any]) -> None:
    found = differences(there, wanted)
    assert not found, f"{what}: {found}"
