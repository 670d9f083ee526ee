"""An export's intervals in Postgres: loaded once, completed by re-runs, read back by what is downstream."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import dagster as dg
import polars as pl

from pg_exports import PostgresExport
from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, mapping, person


def test_a_rerun_adds_only_the_late_rows(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    source.insert("events", event(hour, timestamp=hour - 30 * 24 * HOUR))
    assert run(export, partition_key(hour)).counts == (1, 0, 2)
    assert run(export, partition_key(hour)).counts == (0, 0, 3)
    assert target.count("events") == 3


def test_a_range_over_hours_that_single_runs_loaded_adds_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR), event(hour - HOUR))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    both = run(export, partition_key(hour - HOUR), partition_key(hour + HOUR))
    assert both.counts == (2, 0, 1)
    assert sorted(both.metadata) == [partition_key(hour - HOUR), partition_key(hour), partition_key(hour + HOUR)]


def test_a_day_over_hours_that_another_export_loaded_adds_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    day = hour.replace(hour=0) - 24 * HOUR
    source.insert("events", event(day + 5 * HOUR), event(day + 6 * HOUR))
    run(export_of("events", target, day, start=day), partition_key(day + 5 * HOUR))
    daily = export_of("events", target, day, start=day.date(), name="daily", table="events", interval="day")
    assert run(daily, f"{day:%Y-%m-%d}").counts == (1, 0, 1)


def test_first_runs_of_one_interval_and_of_the_day_around_it_at_the_same_moment_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    day = hour.replace(hour=0) - 24 * HOUR
    source.insert("events", *(event(day + n * HOUR) for n in range(24)))
    hourly = export_of("events", target, day, start=day)
    daily = export_of("events", target, day, start=day.date(), name="daily", table="events", interval="day")
    keys = [partition_key(day + 5 * HOUR)] * 3
    with ThreadPoolExecutor(4) as threads:
        runs = [*(threads.submit(run, hourly, key) for key in keys), threads.submit(run, daily, f"{day:%Y-%m-%d}")]
    assert [done.result().error for done in runs] == [None] * 4
    assert sum(done.result().counts[0] for done in runs) == 24
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(24, 24)]


def test_rows_that_were_in_the_table_before_are_recognised(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    here = event(hour)
    source.insert("events", here, event(hour))
    target.execute(
        'CREATE TABLE events (uuid text, event text, "timestamp" timestamptz, distinct_id text, team_id bigint)',
        f"INSERT INTO events VALUES ('{here['uuid']}', '$pageview', now(), 'a', {TEAM})",
        "GRANT INSERT, SELECT ON events TO exporter",
    )
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (1, 0, 1)


def test_a_table_that_was_truncated_is_loaded_afresh(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    target.execute("TRUNCATE events")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_a_table_that_was_rewritten_keeps_its_rows_once(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    target.execute("VACUUM FULL events")
    assert run(export, partition_key(hour)).counts == (0, 0, 1)


def test_another_teams_export_into_the_same_table_keeps_both_teams_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour, team_id=2))
    run(export_of("events", target, hour), partition_key(hour))
    other = export_of("events", target, hour, name="team_two", table="events", team_id=2)
    assert run(other, partition_key(hour)).counts == (1, 0, 0)
    assert target.rows("SELECT team_id FROM events ORDER BY 1") == [(1,), (2,)]


def test_an_export_that_changes_its_team_and_back_finds_its_rows_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour, team_id=2))
    for team, counts in ((1, (1, 0, 0)), (2, (1, 0, 0)), (1, (0, 0, 1)), (2, (0, 0, 1))):
        assert run(export_of("events", target, hour, team_id=team), partition_key(hour)).counts == counts


def test_a_table_that_was_renamed_away_and_back_finds_its_rows_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour - HOUR))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour - HOUR), partition_key(hour)).counts == (2, 0, 0)
    target.execute("ALTER TABLE events RENAME TO kept")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    target.execute("DROP TABLE events", "ALTER TABLE kept RENAME TO events")
    assert run(export, partition_key(hour)).counts == (0, 0, 1)


def test_an_empty_interval_succeeds_and_stands_in_the_ledger(target: Target, run: RunExport, hour: datetime) -> None:
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (0, 0, 0)
    assert target.rows("SELECT destination, export, rows_at_source FROM pg_exports_ledger") == [("events", "events", 0)]


def test_an_empty_interval_fails_where_the_role_may_not_write(target: Target, run: RunExport, hour: datetime) -> None:
    target.execute("CREATE TABLE events (uuid text)", "GRANT SELECT ON events TO exporter")
    error = run(export_of("events", target, hour), partition_key(hour)).error
    assert error is not None
    assert f'GRANT INSERT, SELECT, UPDATE ON "{target.schema}"."events" TO "exporter";' in error


def test_the_ledger_holds_an_intervals_counts_and_its_run(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour))
    run(export_of("events", target, hour), partition_key(hour))
    [row] = target.rows(
        "SELECT interval_start, interval_end, team_id, rows_at_source, rows_inserted, bytes > 0, run_id <> '',"
        " started_at <= committed_at FROM pg_exports_ledger"
    )
    assert row == (hour, hour + HOUR, TEAM, 2, 2, True, True, True)


def test_a_failing_interval_leaves_nothing_and_those_before_it_stay(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR), event(hour + HOUR, event="x" * 201))
    export = export_of("events", target, hour, on_bad_rows="fail")
    failed = run(export, partition_key(hour), partition_key(hour + HOUR))
    assert failed.error is not None
    assert "Column event" in failed.error
    assert target.count("events") == 1
    assert target.count("pg_exports_ledger") == 1
    assert target.rows("SELECT relname FROM pg_class WHERE relname LIKE 'pg_exports_staging%'") == []


def test_an_interval_that_cannot_commit_leaves_neither_rows_nor_ledger(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    run(export, partition_key(hour - HOUR))
    target.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$",
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    failed = run(export, partition_key(hour))
    assert failed.error is not None
    assert "refuse() line 1 at RAISE" in failed.error
    assert (target.count("events"), target.count("pg_exports_ledger")) == (0, 1)
    target.execute("DROP TRIGGER late ON events")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_each_interval_is_one_transaction_from_its_locks_to_its_ledger(
    sandbox: Sandbox, source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    source.insert("person", person(hour, uuid.UUID(int=1), 1))
    source.insert("person_distinct_id2", mapping(hour, "a", uuid.UUID(int=1)))
    before = sandbox.postgres.log.stat().st_size
    events, persons = export_of("events", target, hour), export_of("persons", target, hour)
    for export in (events, persons):
        assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", event(hour))
    assert run(events, partition_key(hour)).counts == (1, 0, 1)
    assert run(persons, partition_key(hour)).counts == (0, 0, 1)
    with sandbox.postgres.log.open() as log:
        log.seek(before)
        text = log.read()
    assert "transaction in progress" not in text
    locked = "pg_advisory_xact_lock(hashtext($1), number::int)"
    writing = [part.split(": COMMIT")[0] for part in text.split("BEGIN ISOLATION") if locked in part]
    assert len(writing) == 4
    for part in writing:
        ledger = part.index(f'INSERT INTO "{target.schema}"."pg_exports_ledger"')
        assert part.index(locked) < part.index('COPY "') < ledger


def test_rows_that_postgres_cannot_hold_are_repaired_or_set_aside_and_the_others_land(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert(
        "events",
        event(hour, event="good"),
        event(hour, event="nul", properties=r'{"a": "\u0000 \\u0000"}'),
        event(hour, event="no json", properties='{"a": NaN}'),
        event(hour, event="number", properties='{"a": 1e200000}'),
        event(hour, event="x" * 201),
        event(hour, event="last"),
    )
    done = run(export_of("events", target, hour), partition_key(hour))
    assert done.counts == (3, 0, 0)
    [metadata] = done.metadata.values()
    assert (metadata["rows_at_source"], metadata["rows_repaired"], metadata["rows_rejected"]) == (6, 1, 3)
    landed = target.rows("SELECT event, properties->>'a' FROM events ORDER BY 1")
    assert landed == [("good", None), ("last", None), ("nul", "\ufffd \\u0000")]
    aside = target.rows("SELECT key->>'event', column_name, reason, run_id <> '' FROM pg_exports_rejected ORDER BY 1")
    assert [row[0] for row in aside] == ["no json", "number", "x" * 201]
    assert aside[2][1] == "event"
    assert all(row[2] and row[3] for row in aside)
    assert target.rows("SELECT rows_repaired, rows_rejected FROM pg_exports_ledger") == [(1, 3)]


def test_a_rejected_row_is_kept_as_it_was_even_with_a_nul_in_its_key(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    nul = event(hour, distinct_id="a\0b", event="x" * 201, properties=r'{"a": "\u0000"}')
    source.insert("events", nul, event(hour))
    source.insert("person", person(hour, uuid.UUID(int=1), 1))
    for distinct_id in ("a\0b", "x" * 2_700, "good"):
        source.insert("person_distinct_id2", mapping(hour, distinct_id, uuid.UUID(int=1)))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (1, 0, 0)
    assert run(export_of("persons", target, hour), partition_key(hour)).counts == (1, 0, 0)
    kept = target.rows(
        "SELECT export, row_as_it_was, reason FROM pg_exports_rejected ORDER BY export, length(row_as_it_was)"
    )
    assert [row[0] for row in kept] == ["events", "persons", "persons"]
    assert json.loads(kept[0][1])["distinct_id"] == "a\0b"
    assert json.loads(kept[0][1])["properties"] == nul["properties"]
    assert json.loads(kept[1][1])["distinct_id"] == "a\0b"
    assert "longer than" in kept[2][2]


def test_many_bad_rows_among_many_good_ones_hold_nothing_up(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    good, bad = '{"a": 1}', '{"a": NaN}'
    source.insert("events", *(event(hour, properties=bad if n % 7 == 0 or n > 2_900 else good) for n in range(3_000)))
    done = run(export_of("events", target, hour), partition_key(hour))
    rejected = sum(1 for n in range(3_000) if n % 7 == 0 or n > 2_900)
    assert done.counts == (3_000 - rejected, 0, 0)
    assert target.count("pg_exports_rejected") == rejected
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(3_000 - rejected,) * 2]


def test_a_rejected_row_lands_once_its_cause_is_mended(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event="x" * 201), event(hour, properties='{"a": NaN}'))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (0, 0, 0)
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE text")
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    assert target.rows("SELECT column_name, resolved_at IS NOT NULL FROM pg_exports_rejected ORDER BY 2") == [
        ("properties", False),
        ("event", True),
    ]


def test_with_fail_a_bad_row_is_named_and_nothing_is_written(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    bad = event(hour, properties=r'{"a": "\u0000"}')
    source.insert("events", event(hour), bad)
    failed = run(export_of("events", target, hour, on_bad_rows="fail"), partition_key(hour))
    assert failed.error is not None
    assert str(bad["uuid"]) in failed.error
    assert (target.count("events"), target.count("pg_exports_rejected")) == (0, 0)


def test_an_event_that_two_intervals_received_lands_in_each_or_once_in_the_table(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    again = event(hour)
    source.insert("events", again)
    source.insert("events", again | {"inserted_at": hour + HOUR, "_timestamp": hour + HOUR})
    each = export_of("events", target, hour)
    assert run(each, partition_key(hour), partition_key(hour + HOUR)).counts == (2, 0, 0)
    once = export_of("events", target, hour, name="once", table="once", deduplicate="table")
    assert run(once, partition_key(hour), partition_key(hour + HOUR)).counts == (1, 0, 1)


def test_downstream_reads_the_intervals_rows_where_the_table_has_inserted_at(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR), event(hour + HOUR, team_id=2))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    target.execute("ALTER TABLE events ADD COLUMN inserted_at timestamptz")
    read = run(export, partition_key(hour + HOUR), downstream=[row_count(export)])
    assert read.error is None
    assert f"1 rows, {{}}, {hour + HOUR}" in " ".join(read.log)


def test_downstream_reads_the_whole_table_where_it_has_no_inserted_at(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR), event(hour + HOUR, team_id=2))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    read = run(export, partition_key(hour + HOUR), downstream=[row_count(export)])
    assert read.error is None
    assert "2 rows" in " ".join(read.log)


def row_count(export: PostgresExport) -> dg.AssetsDefinition:
    partitions = next(iter(export.build_defs(None).assets or [])).partitions_def  # type: ignore[union-attr]

    @dg.asset(partitions_def=partitions, io_manager_key="memory", resource_defs={"memory": dg.mem_io_manager})
    def downstream(context: dg.AssetExecutionContext, events: pl.DataFrame) -> None:
        seen = events["inserted_at"].to_list()[-1] if "inserted_at" in events.columns else ""
        context.log.info(f"{events.height} rows, {json.loads(events['properties'][0])}, {seen}")

    return downstream
