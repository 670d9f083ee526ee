"""Intervals that share a query and a transaction: what they leave is what each of them alone would have left."""

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pg_exports import PostgresExport
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually, held_in_commit
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy
from pg_exports_tests.postgres.test_session import log_size
from pg_exports_tests.source_rows import (
    HOUR,
    MICROSECOND,
    event,
    export_of,
    insert_sessions,
    mapping,
    new_session,
    person,
    session,
)
from pg_exports_tests.test_bad_values import insert
from pg_exports_tests.test_concurrency import holding, waiting
from pg_exports_tests.test_ranges import copies_since, each_once, hour_lock, in_ledger, refuse, shown

MINUTES = timedelta(minutes=5)

COUNTS = ("at_source", "inserted", "updated", "unchanged", "repaired", "rejected")


@pytest.fixture
def hours(hour: datetime) -> list[datetime]:
    """Six hours that follow each other: a range's run writes the first one, and then the five others together."""
    return [hour - n * HOUR for n in (5, 4, 3, 2, 1, 0)]


@pytest.fixture
def whole(hours: list[datetime]) -> tuple[str, str]:
    """Their range."""
    return partition_key(hours[0]), partition_key(hours[-1])


def queries(source: Source, export: str) -> list[tuple[str, str]]:
    """What an export has asked ClickHouse, oldest first: for rows or fingerprints, and of which partitions."""
    source.execute("SYSTEM FLUSH LOGS")
    return source.rows(
        "SELECT if(query LIKE '%state_xor%', 'fingerprints', 'rows'), JSONExtractString(log_comment, 'partition')"
        " FROM system.query_log WHERE type = 'QueryFinish' AND has(databases, {database:String})"
        " AND JSONExtractString(log_comment, 'export') = {export:String} ORDER BY query_start_time_microseconds",
        {"database": source.database, "export": export},
    )


def transactions(target: Target, first: datetime) -> list[int]:
    """How many of the intervals from `first` on each transaction has written that was the last to do so."""
    rows = target.rows(
        f"SELECT count(*) FROM pg_exports_ledger WHERE interval_start >= '{first}' AND export <> 'other'"
        " GROUP BY xmin ORDER BY min(interval_start)"
    )
    return [int(intervals) for (intervals,) in rows]


# The same as one by one: in the table, in the ledger, among the rejected rows and in the metadata


def some_events(source: Source, hours: Sequence[datetime]) -> None:
    twice = event(hours[1], event="twice")
    source.execute("SYSTEM STOP MERGES events")
    insert(
        source,
        "events",
        event(hours[0], properties='{"$set": {"a": 1.50}, "$ip": "1.2.3.4"}'),
        event(hours[0], properties=""),
        twice,
        event(hours[1], properties=r'{"a": "\u0000"}'),
        event(hours[1], event="x" * 201),
        event(hours[3], properties="null"),
        event(hours[3], properties=r'{"a": "\ud83d"}'),
        event(hours[3], properties='{"a": NaN}'),
        event(hours[4], event="y" * 201),
        event(hours[5], properties='{"a": "\udcff", "$set": null}'),
        event(hours[5] + HOUR - MICROSECOND),
        event(hours[5] + HOUR),
    )
    insert(source, "events", twice | {"inserted_at": hours[3], "_timestamp": hours[3]})


def more_events(source: Source, hours: Sequence[datetime]) -> None:
    insert(
        source,
        "events",
        event(hours[2]),
        event(hours[4], properties=r'{"\u0000": 1}'),
        event(hours[4], event="z" * 201),
    )


PEOPLE = {name: uuid.UUID(int=n) for n, name in enumerate(("ada", "bob", "eve", "long", "nan"), start=1)}


def some_persons(source: Source, hours: Sequence[datetime]) -> None:
    source.execute("SYSTEM STOP MERGES person")
    source.execute("SYSTEM STOP MERGES person_distinct_id2")
    persons = [
        *(person(hours[n], PEOPLE["ada"], n) for n in (0, 1, 3, 5)),
        person(hours[1], PEOPLE["bob"], 1, properties=r'{"a": "\u0000"}'),
        person(hours[3], PEOPLE["eve"], 1, properties="null"),
        person(hours[3], PEOPLE["long"], 1),
        person(hours[5], PEOPLE["long"], 2),
        person(hours[4], PEOPLE["nan"], 1, properties='{"a": NaN}'),
    ]
    mappings = [
        mapping(hours[0], "ada", PEOPLE["ada"]),
        mapping(hours[0], "ada too", PEOPLE["ada"], is_deleted=1),
        mapping(hours[1], "bob", PEOPLE["bob"]),
        mapping(hours[3], "bob", PEOPLE["eve"], 1),
        mapping(hours[1], "still bob", PEOPLE["bob"]),
        mapping(hours[5], "still bob", PEOPLE["bob"], 1),
        mapping(hours[3], "x" * 3_000, PEOPLE["long"]),
        mapping(hours[4], "nan", PEOPLE["nan"]),
    ]
    # One by one, as ClickHouse keeps the latest version alone of the rows of one insert.
    for row in persons:
        source.insert("person", row)
    for row in mappings:
        source.insert("person_distinct_id2", row)


def more_persons(source: Source, hours: Sequence[datetime]) -> None:
    source.insert("person", person(hours[5], PEOPLE["ada"], 9))
    source.insert("person", person(hours[2], PEOPLE["nan"], 2))
    source.insert("person_distinct_id2", mapping(hours[2], "eve", PEOPLE["eve"]))
    source.insert("person_distinct_id2", mapping(hours[4], "eve", PEOPLE["eve"], 1))


SESSIONS = {n: new_session(datetime(2026, 11, 1, tzinfo=UTC) + n * HOUR) for n in range(8)}


def some_sessions(source: Source, hours: Sequence[datetime]) -> None:
    insert_sessions(
        source,
        session(SESSIONS[0], hours[0], urls=["/a", "/b"]),
        session(SESSIONS[1], hours[0]),
        session(SESSIONS[2], hours[1], entry_url="https://a/\0"),
        session(SESSIONS[3], hours[1], distinct_id="x" * 201),
        session(SESSIONS[4], hours[3], urls=["/\0"], initial_utm_source="null"),
        session(SESSIONS[5], hours[4], distinct_id="y" * 201),
        session(SESSIONS[6], hours[5]),
    )
    # It counts in its last interval alone.
    insert_sessions(source, session(SESSIONS[1], hours[3]))


def more_sessions(source: Source, hours: Sequence[datetime]) -> None:
    insert_sessions(source, session(SESSIONS[7], hours[2]), session(SESSIONS[1], hours[4]))
    # It changes within its hour.
    insert_sessions(source, session(SESSIONS[6], hours[5] + MICROSECOND, urls=["/c"]))


def left(target: Target, table: str) -> dict[str, list[tuple[Any, ...]]]:
    """What the runs of an export have left of its intervals, but for the names, times and bytes of the runs."""
    return {
        "rows": sorted(target.rows(f"SELECT t::text FROM {table} AS t")),
        "ledger": target.rows(
            "SELECT team_id, interval_start, interval_end, fingerprint, rows_before, rows_at_source, rows_inserted,"
            " rows_updated, rows_unchanged, rows_repaired, rows_rejected, rows_missing, keys"
            f" FROM pg_exports_ledger WHERE destination = '{table}' ORDER BY interval_start"
        ),
        "keys": target.rows(
            "SELECT interval_start, interval_end, sum(octet_length(keys)) FROM pg_exports_keys"
            f" WHERE destination = '{table}' GROUP BY 1, 2 ORDER BY 1"
        ),
        "rejected": target.rows(
            "SELECT interval_start, interval_end, key::text, column_name, row_as_it_was, resolved_at IS NULL"
            f" FROM pg_exports_rejected WHERE destination = '{table}' ORDER BY 1, 5"
        ),
        "bytes": target.rows(
            f"SELECT interval_start, bytes FROM pg_exports_ledger WHERE destination = '{table}' ORDER BY 1"
        ),
    }


def counts(metadata: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """The counts of each partition."""
    names = ["dagster/partition_row_count", *(f"rows_{name}" for name in COUNTS), "interval_start", "interval_end"]
    return {key: [values[name] for name in names] for key, values in sorted(metadata.items())}


Fill = Callable[[Source, Sequence[datetime]], None]


@pytest.mark.parametrize(
    ("model", "some", "more", "known"),
    [
        # at the source, inserted, updated, unchanged, repaired, rejected
        ("events", some_events, more_events, ((12, 9, 0, 0, 3, 3), (15, 2, 0, 9, 1, 4))),
        ("persons", some_persons, more_persons, ((15, 4, 0, 8, 2, 3), (19, 2, 2, 13, 2, 2))),
        ("sessions", some_sessions, more_sessions, ((7, 5, 0, 0, 2, 2), (8, 1, 2, 3, 2, 2))),
    ],
)
def test_a_range_in_one_run_leaves_what_runs_of_its_intervals_leave(
    source: Source,
    target: Target,
    run: RunExport,
    hours: list[datetime],
    whole: tuple[str, str],
    model: str,
    some: Fill,
    more: Fill,
    known: tuple[tuple[int, ...], ...],
) -> None:
    together, apart = (export_of(model, target, hours[-1], name=name, table=name) for name in ("together", "apart"))
    for export in (together, apart):
        assert run(export, partition_key(hours[0] - HOUR)).error is None
        target.execute(f"ALTER TABLE {export.key} ALTER distinct_id TYPE varchar(4000)")
        if model == "sessions":
            target.execute(f"ALTER TABLE {export.key} ALTER distinct_id TYPE varchar(200)")
    for fill, expected in zip((some, more), known, strict=True):
        fill(source, hours)
        at_once = run(together, *whole)
        assert at_once.error is None
        if fill is some:
            assert transactions(target, hours[0]) == [1, 5]
        each = [run(apart, partition_key(hour)) for hour in hours]
        alone = {key: values for one in each for key, values in one.metadata.items()}
        assert counts(at_once.metadata) == counts(alone)
        assert left(target, "together") == left(target, "apart")
        assert [sum(values[f"rows_{name}"] for values in at_once.metadata.values()) for name in COUNTS] == list(
            expected
        )


def test_a_rejected_row_is_kept_under_its_own_interval_and_is_resolved_there(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    kept = "SELECT interval_start, interval_end, count(*), count(resolved_at) FROM pg_exports_rejected GROUP BY 1, 2"
    source.insert("events", *(event(hour, event="x" * 201) for n, hour in enumerate(hours) for _ in range(n)))
    source.insert("events", *(event(hour) for hour in hours))
    export = export_of("events", target, hours[-1])
    rejected = [run(export, *whole).metadata[partition_key(hour)]["rows_rejected"] for hour in hours[:1]]
    assert rejected == [0]
    bounds = [(hour, hour + HOUR) for hour in hours]
    assert target.rows(f"{kept} ORDER BY 1") == [(*bounds[n], n, 0) for n in range(1, 6)]
    target.execute("ALTER TABLE events ALTER event TYPE text")
    assert run(export, *whole).counts == (15, 0, 6)
    assert target.rows(f"{kept} ORDER BY 1") == [(*bounds[n], n, n) for n in range(1, 6)]


# Re-runs


def test_a_rerun_asks_once_for_the_fingerprints_of_all_that_follow_and_reads_the_interval_that_changed_alone(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    keys = [partition_key(hour) for hour in hours]
    source.insert("events", *(event(hour) for n, hour in enumerate(hours, start=1) for _ in range(n)))
    export = export_of("events", target, hours[-1])
    assert run(export, *whole).counts == (21, 0, 0)
    assert queries(source, "events") == [("rows", keys[0]), ("rows", f"{keys[1]}...{keys[5]}")]

    before, offset = len(queries(source, "events")), log_size(target)
    unchanged = run(export, *whole)
    assert shown(unchanged) == [(key, 0, n) for n, key in enumerate(keys, start=1)]
    assert queries(source, "events")[before:] == [
        ("fingerprints", keys[0]),
        ("fingerprints", f"{keys[1]}...{keys[5]}"),
    ]
    assert (transactions(target, hours[0]), copies_since(target, offset)) == ([1, 5], 0)

    source.insert("events", event(hours[3]))
    before, offset = len(queries(source, "events")), log_size(target)
    changed = run(export, *whole)
    assert shown(changed) == [(key, int(n == 4), n) for n, key in enumerate(keys, start=1)]
    asked = queries(source, "events")[before:]
    assert [partitions for what, partitions in asked if what == "rows"] == [keys[3]]
    assert len(asked) <= 5
    assert (transactions(target, hours[0]), copies_since(target, offset)) == ([1, 2, 1, 2], 1)
    assert each_once(target) == 22


# Failures


@pytest.mark.parametrize(("model", "fault"), [("persons", "raise_exception"), ("sessions", "bad row")])
def test_merged_intervals_of_which_one_fails_leave_those_before_it(
    source: Source,
    target: Target,
    run: RunExport,
    hours: list[datetime],
    whole: tuple[str, str],
    model: str,
    fault: str,
) -> None:
    keys = [partition_key(hour) for hour in hours]
    export = export_of(model, target, hours[-1], on_bad_rows="fail")
    assert run(export, partition_key(hours[0] - HOUR)).error is None
    mine, always = [uuid.UUID(int=n) for n in range(6)], uuid.UUID(int=100)
    if model == "persons":
        source.execute("SYSTEM STOP MERGES person")
        # Each hour has one of its own, and one that is touched in all of them.
        source.insert("person", *(person(hour, who, 1) for hour, who in zip(hours, mine, strict=True)))
        for n, hour in enumerate(hours):
            source.insert("person", person(hour, always, n))
        source.insert(
            "person_distinct_id2",
            *(mapping(hour, f"{n}", who) for n, (hour, who) in enumerate(zip(hours, mine, strict=True))),
            mapping(hours[0], "always", always),
        )
    else:
        insert_sessions(source, *(session(new_session(hour), hour) for hour in hours))
    if fault == "bad row":
        target.execute("ALTER TABLE sessions ALTER distinct_id TYPE varchar(5)")
        insert_sessions(source, session(new_session(hours[3]), hours[3], distinct_id="too long"))
    else:
        refuse(target, hours[3], fault)

    failed = run(export, *whole)
    assert failed.error is not None
    assert failed.tries == 1
    again = int(model == "persons")
    assert target.count(model) == 3 + again
    assert sorted(failed.shown) == keys[:3]
    assert [failed.metadata[key]["rows_inserted"] for key in keys[:3]] == [1 + again, 1, 1]
    assert [failed.metadata[key]["rows_unchanged"] for key in keys[:3]] == [0, again, again]
    assert [start for start, _ in in_ledger(target)] == hours[:3]

    target.execute("DROP TRIGGER IF EXISTS refuse ON pg_exports_ledger")
    done = run(export_of(model, target, hours[-1], on_bad_rows="repair"), *whole)
    assert (done.error, done.counts) == (None, (3, 0, 3 + 6 * again))
    assert sum(values["rows_rejected"] for values in done.metadata.values()) == int(fault == "bad row")
    assert target.count(model) == 6 + again


def test_intervals_whose_commit_lost_its_answer_are_there_once_and_shown_with_the_counts_that_they_had(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    export = export_of("events", target, hours[-1])
    # The first interval has no rows: it is the others' commit that is held.
    source.insert("events", *(event(hour) for n, hour in enumerate(hours) for _ in range(n)))
    source.insert("events", event(hours[2], event="x" * 201))
    assert run(export, partition_key(hours[0] - HOUR)).error is None
    offset = log_size(target)
    with (
        tcp_proxy(target.sandbox.postgres.port) as proxy,
        ThreadPoolExecutor() as threads,
        held_in_commit(target) as hold,
    ):
        future = threads.submit(run, export, *whole, postgres=target.resource(port=proxy.port))
        hold.wait()
        proxy.cut_client()
        hold.release()
        done = future.result()
    assert (done.error, done.tries) == (None, 2)
    assert each_once(target) == 15
    assert shown(done) == [(partition_key(hour), n, 0) for n, hour in enumerate(hours)]
    assert [done.metadata[partition_key(hour)]["rows_rejected"] for hour in hours] == [0, 0, 1, 0, 0, 0]
    assert transactions(target, hours[0]) == [1, 5]
    assert copies_since(target, offset) == 1


def test_a_connection_that_is_lost_in_the_midst_of_a_range_adds_nothing_twice_and_each_interval_has_its_counts(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    export = export_of("events", target, hours[-1])
    source.insert("events", *(event(hour) for n, hour in enumerate(hours, start=1) for _ in range(n)))
    assert run(export, partition_key(hours[0] - HOUR)).error is None
    target.execute(
        "CREATE SEQUENCE tries",
        f"""
        CREATE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            IF new.interval_start = '{hours[3]}' AND nextval('"{target.schema}".tries') < 3 THEN
                PERFORM pg_terminate_backend(pg_backend_pid());
            END IF;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER hang_up BEFORE INSERT ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION hang_up()",
    )
    done = run(export, *whole)
    # With the others, alone, and once more.
    assert (done.error, done.tries) == (None, 3)
    assert each_once(target) == 21
    assert shown(done) == [(partition_key(hour), n, 0) for n, hour in enumerate(hours, start=1)]
    assert in_ledger(target) == [(hour, n) for n, hour in enumerate(hours, start=1)]
    assert done.reconciliation.passed
    assert done.reconciliation.metadata["rows_written"].value == 21


# Other runs


def test_an_interval_that_another_run_holds_is_waited_for_when_those_before_it_have_landed(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    export = export_of("events", target, hours[-1])
    source.insert("events", *(event(hour) for n, hour in enumerate(hours, start=1) for _ in range(n)))
    assert run(export, partition_key(hours[0] - HOUR)).error is None
    with ThreadPoolExecutor() as threads:
        with holding(target, hour_lock(target, hours[3])):
            future = threads.submit(run, export, *whole)
            eventually(lambda: waiting(target) == 1)
            assert in_ledger(target) == [(hour, n) for n, hour in enumerate(hours[:3], start=1)]
            # Nobody is kept from the intervals that wait for it.
            assert run(export, partition_key(hours[5])).counts == (6, 0, 0)
        done = future.result()
    assert (done.error, done.tries) == (None, 1)
    expected = [(partition_key(hour), n, 0) for n, hour in enumerate(hours, start=1)]
    expected[5] = (partition_key(hours[5]), 0, 6)
    assert shown(done) == expected
    assert each_once(target) == 21
    assert transactions(target, hours[0]) == [1, 2, 2, 1]


# Intervals of other lengths


@pytest.mark.parametrize("is_held", [False, True], ids=["free", "held by another run"])
def test_intervals_of_five_minutes_that_share_an_hour_land_together(
    source: Source, target: Target, run: RunExport, hour: datetime, is_held: bool
) -> None:
    """The 1st, the 2nd to 9th (with the last two of the hour's twelve), and the rest."""
    starts = [hour + n * MINUTES for n in range(5, 19)]
    source.insert(
        "events", *(event(start + change) for start in starts for change in (0 * HOUR, MINUTES - MICROSECOND))
    )
    export = export_of("events", target, hour, interval="every 5 minutes", start=hour)
    assert run(export, partition_key(hour)).error is None
    range_of_keys = partition_key(starts[0]), partition_key(starts[-1])
    if is_held:
        with ThreadPoolExecutor() as threads:
            with holding(target, hour_lock(target, hour + HOUR)):
                future = threads.submit(run, export, *range_of_keys)
                eventually(lambda: waiting(target) == 1)
                # The seven of the first hour.
                assert in_ledger(target) == [(start, 2) for start in starts[:7]]
            done = future.result()
    else:
        done = run(export, *range_of_keys)
    assert done.error is None
    assert transactions(target, starts[0]) == ([1, 6, 7] if is_held else [1, 8, 5])
    assert in_ledger(target) == [(start, 2) for start in starts]
    assert shown(done) == [(partition_key(start), 2, 0) for start in starts]
    assert each_once(target) == 28
    assert run(export, *range_of_keys).counts == (0, 0, 28)


@pytest.mark.parametrize("midnight", [datetime(2026, 3, 27), datetime(2026, 10, 23)], ids=["23 hours", "25 hours"])
def test_a_day_on_which_the_clocks_change_lands_together_with_the_days_around_it(
    source: Source, target: Target, run: RunExport, midnight: datetime
) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    days = [(midnight + timedelta(days=n)).replace(tzinfo=berlin).astimezone(UTC) for n in range(6)]
    assert days[3] - days[2] != timedelta(days=1)
    export = export_of("events", target, days[0], interval="day", timezone="Europe/Berlin", start=midnight.date())
    for start, end in pairwise(days):
        source.insert("events", event(start), event(end - MICROSECOND))
    keys = [f"{midnight + timedelta(days=n):%Y-%m-%d}" for n in range(5)]
    done = run(export, keys[0], keys[-1])
    assert done.error is None
    assert shown(done) == [(key, 2, 0) for key in keys]
    assert transactions(target, days[0]) == [1, 4]
    assert target.rows("SELECT interval_start, interval_end FROM pg_exports_ledger ORDER BY 1") == list(pairwise(days))
    assert each_once(target) == 10
    assert run(export, keys[0], keys[-1]).counts == (0, 0, 10)


# Tables that must be asked for what they have


def rows_before(target: Target, row: dict[str, object]) -> None:
    """One row of the range is there before any export was."""
    target.execute(
        "CREATE TABLE events (uuid text, event text, distinct_id text, team_id bigint)",
        f"INSERT INTO events VALUES ('{row['uuid']}', '{row['event']}', '{row['distinct_id']}', {row['team_id']})",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )


def trigger(target: Target, row: dict[str, object]) -> None:
    """The table's own trigger keeps one row out."""
    target.execute(
        "CREATE TABLE events (uuid text, event text, distinct_id text, team_id bigint)",
        "CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RETURN CASE WHEN new.uuid <> '{row['uuid']}' THEN new END; END $$",
        "CREATE TRIGGER keep_out BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION keep_out()",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )


def nothing(target: Target, row: dict[str, object]) -> None:
    """The table is the export's to make."""


@pytest.mark.parametrize(
    ("prepare", "settings", "expected", "there"),
    [
        pytest.param(rows_before, {}, [(3, 0), (2, 1), (0, 0), (2, 1), (1, 0), (0, 0)], 9, id="rows before"),
        pytest.param(trigger, {}, [(3, 0), (2, 0), (0, 0), (2, 1), (1, 0), (0, 0)], 8, id="a trigger"),
        pytest.param(
            nothing,
            {"deduplicate": "table"},
            [(3, 0), (3, 0), (0, 0), (2, 1), (1, 0), (0, 0)],
            9,
            id="deduplicate: table",
        ),
    ],
)
def test_a_table_that_must_be_asked_takes_one_interval_a_transaction_and_has_the_same_rows_afterwards(
    source: Source,
    target: Target,
    run: RunExport,
    hours: list[datetime],
    whole: tuple[str, str],
    prepare: Callable[[Target, dict[str, object]], None],
    settings: dict[str, Any],
    expected: list[tuple[int, int]],
    there: int,
) -> None:
    rows = [event(hours[n]) for n in (0, 0, 0, 1, 1, 1, 3, 3, 4)]
    source.execute("SYSTEM STOP MERGES events")
    source.insert("events", *rows)
    source.insert("events", rows[4] | {"inserted_at": hours[3], "_timestamp": hours[3]})
    prepare(target, rows[3])
    export = export_of("events", target, hours[-1], **settings)
    done = run(export, *whole)
    kept_out = int(prepare is trigger)
    assert missing(done) == kept_out
    assert done.reconciliation.passed == (not kept_out)
    assert shown(done) == [(partition_key(hour), *pair) for hour, pair in zip(hours, expected, strict=True)]
    assert transactions(target, hours[0]) == [1] * 6
    assert each_once(target) == there
    again = run(export, *whole)
    assert again.counts == (0, 0, 10 - kept_out)
    assert target.count("events") == there
    assert missing(again) == kept_out


def missing(run: Run) -> int:
    """Rows at the source that are nowhere."""
    values = run.metadata.values()
    return sum(
        one["rows_at_source"] - sum(one[f"rows_{name}"] for name in ("inserted", "updated", "unchanged", "rejected"))
        for one in values
    )


def test_what_a_range_is_to_write_together_may_be_of_several_exports(
    source: Source, target: Target, run: RunExport, hours: list[datetime], whole: tuple[str, str]
) -> None:
    """Intervals that go straight in, and one in their midst that another export of the table has written already."""
    source.insert("events", *(event(hour, event=name) for hour in hours for name in "ab"))
    other = export_of("events", target, hours[-1], name="other", table="events", include_events=["a"])
    assert run(other, partition_key(hours[3])).counts == (1, 0, 0)
    export: PostgresExport = export_of("events", target, hours[-1])
    done = run(export, *whole)
    assert shown(done) == [(partition_key(hour), 2 - int(n == 3), int(n == 3)) for n, hour in enumerate(hours)]
    assert transactions(target, hours[0]) == [1, 2, 1, 2]
    assert each_once(target) == 12
