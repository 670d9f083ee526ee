"""Times of any year: each lands as it is if Postgres can hold it, or its row is set aside."""

import json
import uuid
from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
import pytest

from pg_exports.postgres import types
from pg_exports.postgres.types import DestinationColumn
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import export_of, insert_sessions, mapping, new_session, session

LEAST, GREATEST = -(2**63), 2**63 - 1
FIRST = -210_866_803_200_000_000
"""The first microsecond that Postgres has."""

MINUS_INFINITY = LEAST + 946_684_800_000_000
"""What Postgres would take for '-infinity'."""

# Microseconds since 1970, and the time as Postgres has it.
LANDING = {
    GREATEST: "294247-01-10 04:00:54.775807+00",
    253_402_300_800_000_000: "10000-01-01 00:00:00+00",
    253_402_300_799_999_999: "9999-12-31 23:59:59.999999+00",
    -62_135_596_800_000_000: "0001-01-01 00:00:00+00",
    -62_135_596_800_000_001: "0001-12-31 23:59:59.999999+00 BC",
    FIRST: "4714-11-24 00:00:00+00 BC",
}
ASIDE = {
    FIRST - 1: "4714-11-23 23:59:59.999999+00:00 BC",
    MINUS_INFINITY: "290279-12-22 19:59:05.224192+00:00 BC",
    MINUS_INFINITY + 1: "290279-12-22 19:59:05.224193+00:00 BC",
    LEAST: "290309-12-21 19:59:05.224192+00:00 BC",
}


def at(microseconds: int) -> str:
    """ClickHouse's expression of a time."""
    return f"fromUnixTimestamp64Micro(toInt64({microseconds}), 'UTC')"


def insert_events(source: Source, hour: datetime, *times: int) -> None:
    """An event of each time, whose name is the number."""
    rows = ", ".join(
        f"(generateUUIDv4(), '{time}', '{{}}', {at(time)}, 1, 'a', toDateTime64({hour.timestamp()}, 6, 'UTC'))"
        for time in times
    )
    # Such months are not for a partition key.
    source.execute("DROP TABLE events")
    source.execute(
        "CREATE TABLE events (uuid UUID, event String, properties String, timestamp DateTime64(6, 'UTC'), team_id Int64,"
        " distinct_id String, elements_chain String, created_at DateTime64(6, 'UTC'), person_id UUID,"
        " person_properties String, _timestamp DateTime, _offset UInt64,"
        " inserted_at Nullable(DateTime64(6, 'UTC'))) ENGINE = MergeTree ORDER BY uuid"
    )
    source.execute(
        f"INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, inserted_at) VALUES {rows}"
    )


def test_a_time_lands_as_it_is_or_its_row_is_set_aside(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, *LANDING, *ASIDE)
    done = run(export_of("events", target, hour), partition_key(hour))
    assert done.error is None
    assert done.counts == (len(LANDING), 0, 0)
    assert dict(target.rows('SELECT event::bigint, "timestamp"::text FROM events')) == LANDING
    kept = target.rows(
        "SELECT key->>'event', column_name, reason, row_as_it_was::json->>'timestamp' FROM pg_exports_rejected"
    )
    assert {int(name): time for name, _, _, time in kept} == ASIDE
    assert {column for _, column, _, _ in kept} == {"timestamp"}
    for name, _, reason, _ in kept:
        assert f"holds {ASIDE[int(name)]}, which timestamp with time zone cannot hold" in reason
    metadata = done.metadata[partition_key(hour)]
    assert "first_timestamp" not in metadata
    assert "last_timestamp" not in metadata


def test_with_fail_such_a_row_is_named(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    insert_events(source, hour, 0, MINUS_INFINITY)
    failed = run(export_of("events", target, hour, on_bad_rows="fail"), partition_key(hour))
    assert failed.error is not None
    assert f'"event": "{MINUS_INFINITY}"' in failed.error
    assert "Traceback" not in failed.error


def test_the_times_that_can_be_shown_are_shown(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    insert_events(source, hour, 0, GREATEST)
    metadata = run(export_of("events", target, hour), partition_key(hour)).metadata[partition_key(hour)]
    assert metadata["first_timestamp"] == 0
    assert "last_timestamp" not in metadata


def test_a_row_that_is_set_aside_for_another_reason_is_kept_with_its_time(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, GREATEST)
    target.execute(
        'CREATE TABLE events (uuid text, event varchar(3), "timestamp" timestamp)', f"GRANT ALL ON events TO {ROLE}"
    )
    for _ in range(2):
        assert run(export_of("events", target, hour), partition_key(hour)).error is None
    [(row,)] = target.rows("SELECT row_as_it_was FROM pg_exports_rejected WHERE resolved_at IS NULL")
    assert json.loads(row)["timestamp"] == "294247-01-10 04:00:54.775807+00:00"
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE text")
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (1, 0, 0)
    assert target.rows("SELECT count(*) FROM pg_exports_rejected WHERE resolved_at IS NULL") == [(0,)]


def test_times_without_a_time_zone_have_the_same_bounds(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, FIRST, FIRST - 1, MINUS_INFINITY, GREATEST)
    target.execute(
        'CREATE TABLE events (uuid text, event text, "timestamp" timestamp)', f"GRANT ALL ON events TO {ROLE}"
    )
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (2, 0, 0)
    assert target.rows('SELECT "timestamp"::text FROM events ORDER BY events."timestamp"') == [
        ("4714-11-24 00:00:00 BC",),
        ("294247-01-10 04:00:54.775807",),
    ]


def test_persons_and_sessions_of_any_year_land(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    source.insert("person_distinct_id2", mapping(hour, "d", uuid.UUID(int=1)))
    source.execute(
        "INSERT INTO person (id, created_at, team_id, properties, version, _timestamp) SELECT "
        f"toUUID('{uuid.UUID(int=1)}'), fromUnixTimestamp64Milli(toInt64(253402300800000), 'UTC'), 1, '{{}}', 1, "
        f"toDateTime({int(hour.timestamp())}, 'UTC')"
    )
    insert_sessions(source, session(new_session(hour), hour))
    source.execute("RENAME TABLE raw_sessions TO all_sessions")
    source.execute(
        f"CREATE VIEW raw_sessions AS SELECT * REPLACE ({at(FIRST)} AS min_timestamp, {at(GREATEST)} AS max_timestamp)"
        " FROM all_sessions"
    )
    for model in ("persons", "sessions"):
        assert run(export_of(model, target, hour), partition_key(hour)).error is None
    assert target.rows("SELECT created_at::text FROM persons") == [("10000-01-01 00:00:00+00",)]
    assert target.rows("SELECT start_timestamp::text, end_timestamp::text, duration FROM sessions") == [
        (LANDING[FIRST], LANDING[GREATEST], (GREATEST - FIRST) // 1_000_000)
    ]


OWN: dict[str, Any] = {
    "name": "own",
    "query": "SELECT id, moment, day, at FROM own WHERE at >= {interval_start} AND at < {interval_end}",
    "columns": {"moment": "TIMESTAMPTZ", "day": "DATE", "id": "BIGINT", "at": "TIMESTAMPTZ"},
    "key": ["id", "moment", "day"],
}


@pytest.mark.parametrize("version", [[], ["at"]], ids=["appended", "merged"])
def test_an_own_models_times_and_dates_of_any_year_land_or_are_set_aside_and_are_found_again(
    version: list[str], source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute(
        "CREATE TABLE own (id Int64, moment DateTime64(6, 'UTC'), day Date32, at DateTime) ENGINE = MergeTree ORDER BY id"
    )
    for time in (*LANDING, *ASIDE):
        source.execute(f"INSERT INTO own SELECT {time}, {at(time)}, '0001-01-01', {int(hour.timestamp())}")
    export = export_of(OWN | {"version": version}, target, hour, team_id=None)  # type: ignore[arg-type]
    for counts in ((len(LANDING), 0, 0), (0, 0, len(LANDING))):
        done = run(export, partition_key(hour))
        assert (done.error, done.counts) == (None, counts)
    assert dict(target.rows("SELECT id, moment::text FROM own")) == LANDING
    assert target.rows("SELECT DISTINCT day::text FROM own") == [("0001-01-01",)]
    kept = target.rows("SELECT key->>'id', key->>'moment' FROM pg_exports_rejected WHERE resolved_at IS NULL")
    assert {int(number): time for number, time in kept} == ASIDE


def test_a_table_with_times_that_python_lacks_can_be_read_back(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    insert_events(source, hour, 0, 253_402_300_800_000_000)
    read: list[pl.DataFrame] = []

    @dg.asset(ins={"events": dg.AssetIn(input_manager_key="postgres_io_manager")}, partitions_def=None)
    def downstream(events: pl.DataFrame) -> None:
        read.append(events)

    export = export_of("events", target, hour)
    assert run(export, partition_key(hour), downstream=[downstream]).error is None
    [frame] = read
    assert sorted(frame["timestamp"].to_physical()) == [0, 253_402_300_800_000_000]


# What a model of the user's own may not give: ClickHouse makes other times of these, without a word.
CUT = {
    "a time past Date32": ("moment", "DATE", "fromUnixTimestamp64Micro(506804601600000000, 'UTC')"),
    "a time before Date32": ("moment", "DATE", "fromUnixTimestamp64Micro(-99999999999999999, 'UTC')"),
    "no date": ("moment", "DATE", "'nonsense'"),
    "milliseconds": ("moment", "TIMESTAMPTZ", "toInt64(1700000000000)"),
    "milliseconds as a fraction": ("moment", "TIMESTAMP", "toNullable(1.7e12)"),
    "a second too many": ("moment", "TIMESTAMPTZ", "toInt64(253402300800)"),
    "a number too small": ("moment", "TIMESTAMP", "toInt64(-99999999999999)"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_value_of_which_clickhouse_would_make_another_time_stops_the_interval_with_its_column(
    name: str, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    column, type_, value = CUT[name]
    query = f"SELECT number AS id, materialize({value}) AS moment FROM numbers(2) WHERE {{interval_start}} < {{interval_end}}"
    model = {"name": "own", "query": query, "columns": {"id": "BIGINT", column: type_}, "key": ["id"]}
    failed = run(export_of(model, target, hour, team_id=None), partition_key(hour))  # type: ignore[arg-type]
    assert failed.error is not None
    assert f"Column {column} holds" in failed.error
    assert target.count("own") == 0


def test_times_and_dates_that_clickhouse_reads_as_they_are_land(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    columns = {
        "DATE": (
            "fromUnixTimestamp64Micro(253402300799999999, 'UTC')",
            "toDateTime64('2024-01-02 23:59:59', 3, 'America/New_York')",
            "toNullable(toDateTime('2024-01-02 03:04:05', 'UTC'))",
            "CAST(NULL AS Nullable(DateTime64(6)))",
            "'1850-03-04'",
            "''",
            "toDate('2024-01-02')",
        ),
        "TIMESTAMP": (
            "1700000000",
            "toDecimal64(1700000000.123456, 6)",
            "253402300799",
            "'2024-01-02 03:04:05.123456'",
        ),
    }
    named = [(f"c{n}", type_, value) for n, (type_, value) in enumerate((t, v) for t in columns for v in columns[t])]
    query = "SELECT number AS id, " + ", ".join(f"materialize({value}) AS {name}" for name, _, value in named)
    model = {
        "name": "own",
        "query": query + " FROM numbers(1) WHERE {interval_start} < {interval_end}",
        "columns": {"id": "BIGINT", **{name: type_ for name, type_, _ in named}},
        "key": ["id"],
    }
    done = run(export_of(model, target, hour, team_id=None), partition_key(hour))  # type: ignore[arg-type]
    assert done.error is None
    [row] = target.rows("SELECT " + ", ".join(f"{name}::text" for name, _, _ in named) + " FROM own")
    assert row == (
        *("9999-12-31", "2024-01-02", "2024-01-02", None, "1850-03-04", None, "2024-01-02"),
        *("2023-11-14 22:13:20", "2023-11-14 22:13:20.123456", "9999-12-31 23:59:59", "2024-01-02 03:04:05.123456"),
    )


def test_any_time_and_date_is_text_as_postgres_reads_it(target: Target) -> None:
    times = [*LANDING, 0, -1, 10**17, -(10**17)]
    dates = [-2_440_588, -719_528, -719_163, -719_162, 0, 11_016, 2_932_897, 2_145_042_905]
    for microseconds in times:
        seconds, rest = divmod(microseconds, 1_000_000)
        [(same,)] = target.rows(
            f"SELECT '{types.time_text(microseconds)}'::timestamptz"
            f" = '1970-01-01 00:00:00+00'::timestamptz + {seconds // 86_400} * interval '24 hours'"
            f" + interval '{seconds % 86_400} seconds {rest} microseconds'"
        )
        assert same, types.time_text(microseconds)
    for days in dates:
        [(same,)] = target.rows(f"SELECT '{types.date_text(days)}'::date = '1970-01-01'::date + {days}")
        assert same, types.date_text(days)


def test_dates_past_what_postgres_has_are_set_aside(target: Target) -> None:
    column = DestinationColumn("day", "date", "date", None, False, False, False)
    days = [-2_440_588, -2_440_589, None, 2_145_042_905, 2_145_042_906, 2**31 - 1, -(2**31), -(2**31) + 10_957]
    values = pl.Series("day", days, dtype=pl.Int32).cast(pl.Date)
    assert types.past_range(values, column).to_list() == [False, True, False, False, True, True, True, True]
    assert types.range_text(column) == ("4714-11-24 BC", "5874897-12-31")
