"""Fingerprints: what ClickHouse takes of an interval's rows is what a run takes of those that it reads."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from logging import getLogger

import polars as pl

from pg_exports import PostgresExport
from pg_exports.fingerprint import Fingerprint
from pg_exports.interval import Interval
from pg_exports.models import IDENTITY
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, MICROSECOND, event, export_of

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
        "SELECT sum(toUInt128(cityHash64(event, cityHash64(distinct_id), cityHash64(uuid)))) FROM events"
        " WHERE startsWith(distinct_id, 'é')"
    )
    assert total > 2**64
    assert found[2].endswith(f":{total % 2**64:016x}")


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
