"""Fingerprints: what ClickHouse takes of an interval's rows is what a run takes of those that it reads."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from logging import getLogger

import polars as pl
import pytest

from pg_exports import PostgresExport
from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Interval
from pg_exports.models import IDENTITY, INTERVAL, MODELS, STATE, Selection
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
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

DAY = timedelta(days=1)


def identities(*values: int) -> pl.Series:
    return pl.Series(IDENTITY, values, pl.UInt64)


def taken_by_clickhouse(source: Source, export: PostgresExport, starts: Sequence[datetime], end: datetime) -> list[str]:
    """The fingerprint of each interval, all of them in one query."""
    ends = [*starts[1:], end]
    span = [Interval("", start, stop) for start, stop in zip(starts, ends, strict=True)]
    return list(map(str, export.source(source.resource(), {}, getLogger()).fingerprints(span)))


def taken_by_runs(target: Target, export: str = "events") -> list[str]:
    """The fingerprint of each interval, as the ledger has it."""
    rows = target.rows(f"SELECT fingerprint FROM pg_exports_ledger WHERE export = '{export}' ORDER BY interval_start")
    return [fingerprint for (fingerprint,) in rows]


def test_a_fingerprint_is_the_same_in_any_order_and_adds_up_from_parts() -> None:
    one, two, three = 2**64 - 1, 2**63 + 5, 7
    whole = Fingerprint.of(identities(one, two, three))
    assert whole == Fingerprint(3, one ^ two ^ three, (one + two + three) % 2**64)
    assert Fingerprint.of(identities(three, two, one)) == whole
    assert Fingerprint.of(identities(one)) + Fingerprint.of(identities(two, three)) == whole
    assert Fingerprint() + whole == whole + Fingerprint.of(identities()) == whole


def test_rows_that_are_other_ones_or_fewer_have_another_fingerprint() -> None:
    held = Fingerprint.of(identities(1, 2, 3))
    for others in ((1, 2), (1, 2, 3, 0), (1, 2, 4), (0, 1, 5), (4, 8, 12)):
        assert str(Fingerprint.of(identities(*others))) != str(held)


def test_clickhouse_and_a_run_agree_on_an_empty_interval_on_one_row_on_many_and_on_boundaries(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    start = hour - 4 * HOUR
    source.insert("events", event(start + HOUR / 2))
    source.insert("events", *(event(start + HOUR, distinct_id=f"é{n}") for n in range(50)))
    # The first and the last microsecond of an interval; rows without a time of insertion count by `_timestamp`.
    source.insert("events", event(start + 3 * HOUR - MICROSECOND), event(start + 3 * HOUR))
    source.insert("events", event(start + 4 * HOUR - 1_000_000 * MICROSECOND, inserted_at=None))
    source.insert("events", event(start + 4 * HOUR, inserted_at=None), event(start + 4 * HOUR, team_id=TEAM + 1))
    export = export_of("events", target, hour)
    assert run(export, partition_key(start - HOUR), partition_key(hour)).counts == (1 + 50 + 1 + 2 + 1, 0, 0)
    starts = [start + n * HOUR for n in range(-1, 5)]
    found = taken_by_clickhouse(source, export, starts, hour + HOUR)
    assert found == taken_by_runs(target)
    assert [int(fingerprint.split(":")[0]) for fingerprint in found] == [0, 1, 50, 1, 2, 1]
    [(total,)] = source.rows(
        "SELECT sum(toUInt128(cityHash64(cityHash64(event, cityHash64(distinct_id), cityHash64(uuid)), version)))"
        " FROM (SELECT *, bitShiftLeft(toUInt128(toUnixTimestamp(_timestamp)), 64) + _offset AS version FROM events)"
        " WHERE startsWith(distinct_id, 'é')"
    )
    assert total > 2**64
    assert found[2].endswith(f":{total % 2**64:016x}::1")


def test_a_row_that_the_source_holds_twice_counts_once_before_and_after_its_parts_are_merged(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    twice = event(hour)
    source.insert("events", twice, event(hour))
    source.insert("events", twice | {"_timestamp": hour + HOUR, "properties": '{"a": 1}'})
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    before = taken_by_clickhouse(source, export, [hour], hour + HOUR)
    assert source.rows("SELECT count() FROM events") == [(3,)]
    source.execute("SYSTEM START MERGES events")
    source.execute("OPTIMIZE TABLE events FINAL")
    assert source.rows("SELECT count() FROM events") == [(2,)]
    assert taken_by_clickhouse(source, export, [hour], hour + HOUR) == before == taken_by_runs(target)


def test_a_newer_copy_changes_the_fingerprint_and_an_older_one_does_not(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute("SYSTEM STOP MERGES events")
    one = event(hour, _offset=5)
    export = export_of("events", target, hour)

    def taken() -> str:
        [fingerprint] = taken_by_clickhouse(source, export, [hour], hour + HOUR)
        return fingerprint

    source.insert("events", one)
    first = taken()
    source.insert("events", one | {"_offset": 4, "properties": '{"old": 1}'})
    assert taken() == first
    source.insert("events", one | {"_offset": 6, "properties": '{"new": 1}'})
    second = taken()
    assert (second != first, second.split(":")[0]) == (True, "1")
    source.insert("events", one | {"_timestamp": hour + HOUR / 2, "_offset": 0})
    assert taken() not in (first, second)
    # A re-run reads the interval, and records what it is now.
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", one | {"_timestamp": hour + HOUR, "_offset": 0})
    run(export, partition_key(hour))
    assert taken_by_runs(target) == [taken()]


@pytest.mark.parametrize("name", ["persons", "sessions"])
def test_the_fingerprint_of_a_merged_model_is_that_of_the_states_that_are_read(
    sample: Source, sample_end: datetime, name: str
) -> None:
    model, starts = MODELS[name], [sample_end - n * HOUR for n in (3, 2, 1)]
    selection = Selection(TEAM, starts[0], sample_end, starts=tuple(starts))
    with sample.resource().frames(model.query(selection), model, log_comment="") as frames:
        rows = pl.concat(frames)
    assert rows.group_by(IDENTITY, INTERVAL).len()["len"].max() == 1
    by_start = {start: Fingerprint.of(part[STATE]) for (start,), part in rows.group_by(INTERVAL)}
    taken = sample.resource().rows(model.fingerprints(selection), log_comment="")
    assert {start: Fingerprint(*numbers) for start, *numbers in taken} == by_start
    assert len(by_start) == 3


def test_whatever_changes_a_row_changes_its_state_and_a_merge_of_the_sources_parts_does_not(
    source: Source, hour: datetime
) -> None:
    who, one = uuid.uuid4(), new_session(hour)
    source.execute("SYSTEM STOP MERGES person")
    source.execute("SYSTEM STOP MERGES raw_sessions")

    def states(name: str) -> tuple[list[int], list[int]]:
        query = MODELS[name].query(Selection(TEAM, hour, hour + HOUR))
        rows = source.rows(f"SELECT {IDENTITY}, {STATE} FROM ({query.sql})", query.parameters)
        identities, hashes = zip(*rows, strict=True)
        return list(identities), list(hashes)

    source.insert("person", person(hour, who, 1))
    source.insert("person_distinct_id2", mapping(hour, "a", who))
    insert_sessions(source, session(one, hour, ended=hour + HOUR / 2, urls=["/a"]))
    seen = {name: [states(name)] for name in ("persons", "sessions")}
    for row in (
        person(hour, who, 2),
        person(hour, who, 2, _offset=1),
        person(hour + HOUR / 2, who, 2),
    ):
        source.insert("person", row)
        seen["persons"].append(states("persons"))
    for row in (mapping(hour, "a", who, 0, _offset=1), mapping(hour, "a", who, 1)):
        source.insert("person_distinct_id2", row)
        seen["persons"].append(states("persons"))
    # Late events of the session, that move neither its end nor its last insertion.
    late = {"started": hour + HOUR / 4, "ended": hour + HOUR / 4}
    for change in (
        {"urls": ["/b"]},
        {"pageviews": [uuid.uuid4()]},
        {"vitals_lcp": 0.5},
        {"started": hour - HOUR, "entry_url": "/first", "initial_gclid": "x"},
    ):
        insert_sessions(source, session(one, hour, **(late | change)))
        seen["sessions"].append(states("sessions"))
    for name, taken in seen.items():
        assert len({tuple(identities) for identities, _ in taken}) == 1
        assert len({tuple(hashes) for _, hashes in taken}) == len(taken), name
    for table in ("person", "person_distinct_id2", "raw_sessions"):
        source.execute(f"SYSTEM START MERGES {table}")
        source.execute(f"OPTIMIZE TABLE {table} FINAL")
    assert [states(name) for name in seen] == [taken[-1] for taken in seen.values()]


def test_a_fingerprint_of_an_earlier_version_tells_the_number_of_rows_alone() -> None:
    now = Fingerprint(3, 1, 2, ":1")
    assert str(now) == "3:0000000000000001:0000000000000002::1"
    assert now.may_be(str(now))
    assert now.may_be("3:00000000000000aa:00000000000000bb")
    assert not now.may_be("4:00000000000000aa:00000000000000bb")
    assert not now.may_be("3:00000000000000aa:00000000000000bb::1")
    assert Fingerprint(3, 1, 2, "5f0e6913:0a1b2c3d").may_be("3:00000000000000aa:00000000000000bb:5f0e6913")


def test_only_the_events_that_an_export_asks_for_count(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in ("a", "a", "it's", "c", "")))
    settings = {"all": {}, "some": {"include_events": ["a", "it's"]}, "others": {"exclude_events": ["a", "it's"]}}
    counted = {}
    for name, filters in settings.items():
        export = export_of("events", target, hour, name=name, table=name, **filters)
        run(export, partition_key(hour))
        [counted[name]] = taken_by_clickhouse(source, export, [hour], hour + HOUR)
        assert taken_by_runs(target, name) == [counted[name]]
    assert [int(fingerprint.split(":")[0]) for fingerprint in counted.values()] == [5, 3, 2]


def test_days_of_23_and_25_hours_and_both_hours_of_a_repeated_one_agree(
    source: Source, target: Target, run: RunExport
) -> None:
    for first in ("2025-03-28 20:00:00", "2025-10-24 20:00:00"):
        source.execute(
            "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
            " SELECT generateUUIDv4(number), 'tick', '{}', moment, {team:Int64}, toString(number), moment, moment FROM"
            " (SELECT number, toDateTime64({first:String}, 6, 'UTC') + number * 600 AS moment FROM numbers(520))",
            {"team": TEAM, "first": first},
        )
    settings = {"timezone": "Europe/Berlin", "start": "2025-03-01"}
    daily = export_of("events", target, datetime.now(UTC), name="daily", table="daily", interval="day", **settings)
    hourly = export_of("events", target, datetime.now(UTC), name="hourly", table="hourly", **settings)
    shorter, longer = datetime(2025, 3, 29, 23, tzinfo=UTC), datetime(2025, 10, 25, 22, tzinfo=UTC)
    assert run(daily, "2025-03-29", "2025-03-31").error is None
    assert run(daily, "2025-10-25", "2025-10-27").error is None
    found = taken_by_clickhouse(source, daily, [shorter - DAY, shorter, shorter + 23 * HOUR], shorter + 47 * HOUR)
    found += taken_by_clickhouse(source, daily, [longer - DAY, longer, longer + 25 * HOUR], longer + 49 * HOUR)
    assert found == taken_by_runs(target, "daily")
    assert [int(fingerprint.split(":")[0]) // 6 for fingerprint in found] == [24, 23, 24, 24, 25, 24]
    assert run(hourly, "2025-10-26-02:00", "2025-10-26-02:00+0100").error is None
    repeated = [longer + 2 * HOUR, longer + 3 * HOUR]
    assert taken_by_clickhouse(source, hourly, repeated, longer + 4 * HOUR) == taken_by_runs(target, "hourly")
