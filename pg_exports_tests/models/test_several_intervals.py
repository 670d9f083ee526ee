"""One scan of several intervals: split by `INTERVAL`, its rows are those that each interval asked for alone would have."""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from pg_exports.models import IDENTITY, MODELS, Model, Query, Selection
from pg_exports.models.model import INTERVAL, microseconds, moment
from pg_exports.sandbox.sample_data import empty_hour
from pg_exports_tests.conftest import SAMPLE_HOURS, TEAM, Source
from pg_exports_tests.models.comparison import frozen, instant
from pg_exports_tests.source_rows import (
    HOUR,
    MICROSECOND,
    event,
    insert_sessions,
    mapping,
    new_session,
    person,
    session,
)

SECOND = timedelta(seconds=1)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)

OF_A_COPY = frozenset({"created_at", "inserted_at"})
"""What differs between the sample's copies of an event, of which any may come."""


def selections(starts: Sequence[datetime], end: datetime, team_id: int = TEAM) -> tuple[Selection, list[Selection]]:
    """All intervals in one selection, and each interval in one of its own."""
    each = [Selection(team_id, start, after) for start, after in pairwise((*starts, end))]
    return Selection(team_id, starts[0], end, starts=tuple(starts)), each


def rows_of(source: Source, query: Query) -> list[dict[str, Hashable]]:
    """A query's rows by column, with times in UTC and the interval as its beginning."""
    with source.sandbox.clickhouse_client(source.database) as client:
        result = client.query(query.sql, dict(query.parameters))
    rows = [dict(zip(result.column_names, map(_comparable, row), strict=True)) for row in result.result_rows]
    for row in rows:
        start = row[INTERVAL]
        assert isinstance(start, int)
        row[INTERVAL] = moment(start)
    return rows


def _comparable(value: object) -> Hashable:
    return instant(value) if isinstance(value, datetime) else frozen(value)


def counted(rows: list[dict[str, Hashable]], leave_out: frozenset[str] = frozenset()) -> Counter[Hashable]:
    """How often each row comes; a row has its interval among its columns."""
    return Counter(frozenset((name, row[name]) for name in row.keys() - leave_out) for row in rows)


def by_interval(source: Source, query: Query, column: str) -> dict[datetime, list[Hashable]]:
    """The values of a column in each interval that has rows."""
    found: dict[datetime, list[Hashable]] = {}
    for row in sorted(rows_of(source, query), key=lambda row: str(row[column])):
        start = row[INTERVAL]
        assert isinstance(start, datetime)
        found.setdefault(start, []).append(row[column])
    return found


def span(start: datetime, *lengths: timedelta) -> tuple[tuple[datetime, ...], Selection, list[Selection]]:
    """The beginnings of intervals of these lengths from `start`, and their `selections`."""
    bounds = [start]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return tuple(bounds[:-1]), *selections(bounds[:-1], bounds[-1])


@EVERY_MODEL
def test_the_samples_hours_in_one_scan_have_the_rows_of_each_hour_alone(
    model: Model, sample: Source, sample_end: datetime
) -> None:
    starts = [sample_end - back * HOUR for back in range(SAMPLE_HOURS, 0, -1)]
    copies = OF_A_COPY if model.name == "events" else frozenset[str]()
    for team_id in (1, 2):
        whole, each = selections(starts, sample_end, team_id)
        rows = rows_of(sample, model.query(whole))
        alone = [row for one in each for row in rows_of(sample, model.query(one))]
        assert counted(rows, copies) == counted(alone, copies)
        assert len(rows) > 30
        assert {row[INTERVAL] for row in alone} <= set(starts)
        assert empty_hour(sample_end) not in {row[INTERVAL] for row in rows}
        assert max(Counter((row[INTERVAL], *(row[name] for name in model.key)) for row in rows).values()) == 1


@EVERY_MODEL
def test_an_interval_alone_is_the_one_that_its_rows_count_in(
    model: Model, sample: Source, sample_end: datetime
) -> None:
    start = sample_end - SAMPLE_HOURS * HOUR
    rows = rows_of(sample, model.query(Selection(TEAM, start, sample_end)))
    assert {row[INTERVAL] for row in rows} == {start}
    assert max(Counter(tuple(row[name] for name in model.key) for row in rows).values()) == 1


def insert_events(source: Source, moments: Sequence[datetime]) -> None:
    source.insert("events", *(event(at, distinct_id=f"{n:02}") for n, at in enumerate(moments)))


def insert_persons(source: Source, moments: Sequence[datetime]) -> None:
    """Each touched by its mapping alone or by its person alone, to the second."""
    ids = [uuid.uuid4() for _ in moments]
    long_ago = min(moments) - 1_000 * HOUR
    source.insert(
        "person",
        *(person(at if n % 2 else long_ago, who, 0) for n, (who, at) in enumerate(zip(ids, moments, strict=True))),
    )
    source.insert(
        "person_distinct_id2",
        *(
            mapping(long_ago if n % 2 else at, f"{n:02}", who)
            for n, (who, at) in enumerate(zip(ids, moments, strict=True))
        ),
    )


def insert_visits(source: Source, moments: Sequence[datetime]) -> None:
    insert_sessions(source, *(session(new_session(at), at, distinct_id=f"{n:02}") for n, at in enumerate(moments)))


@pytest.mark.parametrize(
    ("name", "insert", "smallest"),
    [
        ("events", insert_events, MICROSECOND),
        ("persons", insert_persons, SECOND),
        ("sessions", insert_visits, MICROSECOND),
    ],
)
@pytest.mark.parametrize(
    ("midnight", "hours"), [(datetime(2026, 3, 28), (24, 23, 24)), (datetime(2026, 10, 24), (24, 25, 24))]
)
def test_days_on_which_clocks_change_have_what_came_between_their_midnights(
    source: Source,
    name: str,
    insert: Callable[[Source, Sequence[datetime]], None],
    smallest: timedelta,
    midnight: datetime,
    hours: tuple[int, ...],
) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    local = [(midnight + timedelta(days=day)).replace(tzinfo=berlin) for day in range(4)]
    bounds = [bound.astimezone(UTC) for bound in local]
    assert tuple((after - start) // HOUR for start, after in pairwise(bounds)) == hours
    insert(source, [bound + change for bound in bounds for change in (-smallest, 0 * smallest)])

    whole, each = selections(local[:-1], local[-1])
    query = MODELS[name].query
    assert by_interval(source, query(whole), "distinct_id") == {
        bounds[0]: ["01", "02"],
        bounds[1]: ["03", "04"],
        bounds[2]: ["05", "06"],
    }
    alone = [row for one in each for row in rows_of(source, query(one))]
    assert counted(rows_of(source, query(whole))) == counted(alone)


def test_an_event_received_in_two_intervals_comes_in_each_and_once(source: Source, hour: datetime) -> None:
    source.execute("SYSTEM STOP MERGES events")
    starts, whole, each = span(hour, HOUR, HOUR / 4, HOUR)
    twice = event(hour, distinct_id="twice")
    others = [twice | change for change in ({"event": "other"}, {"distinct_id": "b"}, {"uuid": uuid.uuid4()})]
    source.insert("events", twice, *others)
    source.insert("events", twice)
    source.insert("events", twice | {"inserted_at": starts[2], "properties": '{"copy": 2}'})
    source.insert("events", twice | {"inserted_at": None, "_timestamp": starts[2]})
    source.insert("events", twice | {"inserted_at": whole.end}, twice | {"inserted_at": hour - MICROSECOND})

    model = MODELS["events"]
    assert by_interval(source, model.query(whole), "distinct_id") == {
        starts[0]: ["b", "twice", "twice", "twice"],
        starts[2]: ["twice"],
    }
    leave_out = frozenset({"properties"})
    alone = [row for one in each for row in rows_of(source, model.query(one))]
    assert counted(rows_of(source, model.query(whole)), leave_out) == counted(alone, leave_out)

    fingerprints = source.rows(model.fingerprints(whole).sql, model.fingerprints(whole).parameters)
    assert {start: rows for start, rows, *_ in fingerprints} == {
        microseconds(starts[0]): 4,
        microseconds(starts[2]): 1,
    }
    assert sorted(fingerprints) == sorted(
        row for one in each for row in source.rows(model.fingerprints(one).sql, model.fingerprints(one).parameters)
    )


def test_filters_on_event_names_hold_in_every_interval(source: Source, hour: datetime) -> None:
    _, whole, _ = span(hour, HOUR, HOUR)
    source.insert("events", *(event(at, event=name) for at in (hour, hour + HOUR) for name in ("it's", "other")))
    filtered = replace(whole, include_events=("it's",))
    assert by_interval(source, MODELS["events"].query(filtered), "event") == {hour: ["it's"], hour + HOUR: ["it's"]}


def test_a_person_touched_in_several_intervals_comes_in_each_in_its_latest_state(
    source: Source, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES person")
    source.execute("SYSTEM STOP MERGES person_distinct_id2")
    starts, whole, each = span(hour, HOUR, HOUR / 2, HOUR / 2, HOUR, HOUR)
    first, second, third, fourth, _ = starts
    before, after = hour - SECOND, whole.end
    ada, bob, eve, sue, tom = (uuid.uuid4() for _ in range(5))
    persons = [
        person(second, ada, 1),
        person(second + SECOND, ada, 2),
        person(fourth, ada, 3),
        person(after, ada, 4),
        # Left by its mapping: what touches it later is no business of the distinct_id's.
        person(first, bob, 1),
        person(third, bob, 2),
        person(third, eve, 1),
        person(before, sue, 1),
        person(after, sue, 2),
        # The highest version is not the last in time.
        person(third, tom, 1),
        person(before, tom, 9),
        person(first, tom, 1, team_id=TEAM + 1),
    ]
    mappings = [
        mapping(first, "ada", ada, 0),
        mapping(second, "ada", ada, 1),
        mapping(before, "ada too", ada),
        mapping(before, "moved", bob, 0),
        mapping(second, "moved", eve, 1),
        mapping(before, "not touched", sue, 0),
        mapping(after, "not touched", sue, 1),
        mapping(before, "tom", tom, 0),
        mapping(fourth, "tom", tom, 0),
        mapping(second, "without a profile", uuid.uuid4()),
        mapping(first, "tom", tom, 5, team_id=TEAM + 1),
    ]
    # One by one, as ClickHouse keeps the latest version alone of the rows of one insert.
    for row in persons:
        source.insert("person", row)
    for row in mappings:
        source.insert("person_distinct_id2", row)
    query = MODELS["persons"].query
    assert by_interval(source, query(whole), "distinct_id") == {
        first: ["ada"],
        second: ["ada", "ada too", "moved"],
        third: ["moved", "tom"],
        fourth: ["ada", "ada too", "tom"],
    }
    rows = rows_of(source, query(whole))
    assert counted(rows) == counted([row for one in each for row in rows_of(source, query(one))])
    assert {(row["distinct_id"], row["person_id"], row["person_version"]) for row in rows} == {
        ("ada", str(ada), 4),
        ("ada too", str(ada), 4),
        ("moved", str(eve), 1),
        ("tom", str(tom), 9),
    }


def test_a_session_counts_in_the_interval_of_its_last_insertion_alone(source: Source, hour: datetime) -> None:
    starts, whole, each = span(hour, HOUR / 3, HOUR, HOUR)
    grows, stays, goes_on = (new_session(hour) for _ in range(3))
    insert_sessions(
        source,
        session(grows, starts[0], distinct_id="grows", urls=["/a"]),
        session(stays, starts[0], distinct_id="stays"),
        session(goes_on, starts[1], distinct_id="goes on"),
    )
    insert_sessions(
        source,
        session(grows, starts[2], distinct_id="grows", urls=["/b"]),
        session(goes_on, whole.end, distinct_id="goes on"),
    )
    model = MODELS["sessions"]
    assert model.without_dictionary
    for query in (model.query, model.without_dictionary.query):
        assert by_interval(source, query(whole), "distinct_id") == {starts[0]: ["stays"], starts[2]: ["grows"]}
        rows = rows_of(source, query(whole))
        assert counted(rows) == counted([row for one in each for row in rows_of(source, query(one))])
        assert {row["urls"] for row in rows} == {("array",), ("array", "/a", "/b")}


@EVERY_MODEL
def test_any_column_can_be_left_out_and_the_rest_is_the_same(
    model: Model, sample: Source, sample_end: datetime
) -> None:
    starts = [sample_end - back * HOUR for back in (3, 2, 1)]
    query = model.query(selections(starts, sample_end)[0])
    rows = rows_of(sample, query)
    names = [column.name for column in model.columns]
    halves = frozenset(names[::2]), frozenset(names[1::2])
    for columns in halves:
        left = rows_of(sample, query.without(sorted(columns)))
        assert set(left[0]) == set(rows[0]) - columns
        hidden = columns | (OF_A_COPY if model.name == "events" else frozenset())
        assert counted(left, hidden) == counted(rows, hidden)
    assert query.without(()) is query


def test_clickhouse_does_not_read_what_is_left_out(sample: Source, sample_end: datetime) -> None:
    query = MODELS["events"].query(Selection(TEAM, sample_end - HOUR, sample_end))
    left_out = ("person_id", "person_properties", "elements_chain", "created_at")
    export = uuid.uuid4().hex
    for asked in (query, query.without(left_out)):
        sample.resource().rows(asked, log_comment=json.dumps({"export": export}))
    whole, less = sample.columns_read(export)
    assert whole - less == {"person_id", "person_properties", "created_at"}


def test_finish_keeps_the_interval_and_needs_no_optional_column() -> None:
    frame = pl.DataFrame(
        {
            "properties": ['{"$set": 1.50}', '{"\\u0024ip": "1.2.3.4"}'],
            "set": ["1.50", None],
            "set_once": pl.Series([None, None], dtype=pl.String),
            "ip": pl.Series([None, None], dtype=pl.String),
            IDENTITY: pl.Series([1, 2**64 - 1], dtype=pl.UInt64),
            INTERVAL: [1_700_000_000_000_000, 1_700_003_600_000_000],
            "suspect": pl.Series([0, 1], dtype=pl.UInt8),
        }
    )
    expected = frame.drop("suspect").with_columns(ip=pl.Series([None, "1.2.3.4"]))
    assert MODELS["events"].finish(frame).equals(expected)
    assert MODELS["events"].finish(frame[:1]).equals(expected[:1])
