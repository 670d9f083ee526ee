"""Key journals: what they know makes a re-run cheap, and what they do not know the table itself is asked for."""

from datetime import datetime

import dagster as dg

from pg_exports import PostgresExport, PostgresIOManager
from pg_exports.postgres import journal
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of

ADVICE = "is asked for keys, and read as a whole for it"


def journaled(target: Target) -> list[int]:
    """The keys in all the journals, as often as they stand there."""
    rows = target.rows("SELECT keys FROM pg_exports_keys ORDER BY interval_start, run_id, piece")
    data = b"".join(bytes(keys) for (keys,) in rows)
    return sorted(int.from_bytes(data[place : place + 8], "little") for place in range(0, len(data), 8))


def at_source(source: Source) -> list[int]:
    """The identities of ClickHouse's events."""
    rows = source.rows("SELECT cityHash64(event, cityHash64(distinct_id), cityHash64(uuid)) FROM events ORDER BY 1")
    return [identity for (identity,) in rows]


def each_once(source: Source, target: Target) -> bool:
    """Whether the table has every event of ClickHouse's, once."""
    [(events,)] = source.rows("SELECT count() FROM events")
    return target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(events, events)]


def test_a_journal_has_the_key_of_every_row_that_is_in_the_table_and_of_no_other(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, distinct_id=f"é{n}") for n in range(20)), event(hour, properties='{"a": 1}'))
    landed = at_source(source)
    source.insert("events", event(hour, event="x" * 201))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (21, 0, 0)
    assert journaled(target) == landed
    assert len(at_source(source)) == 22


def test_a_journal_of_several_pieces_knows_all_of_its_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.execute(
        "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at)"
        " SELECT generateUUIDv4(number), 'tick', '{}', {hour:DateTime64(6)}, {team:Int64}, toString(number),"
        " {hour:DateTime64(6)}, {hour:DateTime64(6)} FROM numbers({rows:UInt64})",
        {"hour": f"{hour:%Y-%m-%d %H:%M:%S}", "team": TEAM, "rows": journal.PIECE + 100},
    )
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (journal.PIECE + 100, 0, 0)
    pieces = target.rows("SELECT octet_length(keys) / 8 FROM pg_exports_keys ORDER BY piece")
    assert len(pieces) > 1
    assert max(pieces) <= (journal.PIECE,)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, journal.PIECE + 100)
    assert journaled(target) == at_source(source)


def test_of_journals_that_were_pruned_the_table_is_asked_and_they_are_whole_again(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    for _ in range(2):
        source.insert("events", event(hour), event(hour))
        run(export, partition_key(hour))
    [(first,)] = target.rows("SELECT run_id FROM pg_exports_keys ORDER BY run_id LIMIT 1")
    for pruned in (f"WHERE run_id = '{first}'", ""):
        target.execute(f"DELETE FROM pg_exports_keys {pruned}")
        source.insert("events", event(hour))
        asked = run(export, partition_key(hour))
        assert asked.counts[0] == 1
        assert ADVICE in " ".join(asked.log)
        assert each_once(source, target)
        assert sorted(set(journaled(target))) == at_source(source)
    source.insert("events", event(hour))
    known = run(export, partition_key(hour))
    assert known.counts == (1, 0, 6)
    assert ADVICE not in " ".join(known.log)


def test_journals_that_were_pruned_count_for_nothing_after_a_rerun_that_found_nothing_new(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    export = export_of("events", target, hour)
    source.insert("events", event(hour), event(hour))
    run(export, partition_key(hour))
    target.execute("DELETE FROM pg_exports_keys")
    assert run(export, partition_key(hour)).counts == (0, 0, 2)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 2)
    assert each_once(source, target)


def test_a_replay_adds_no_key_that_the_journals_have(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour) for _ in range(5)))
    export = export_of("events", target, hour)
    replay = {"ops": {"events": {"config": {"replay": True}}}}
    assert run(export, partition_key(hour)).counts == (5, 0, 0)
    target.execute("DELETE FROM events WHERE uuid IN (SELECT uuid FROM events LIMIT 2)")
    assert run(export, partition_key(hour), run_config=replay).counts == (2, 0, 3)
    assert run(export, partition_key(hour), run_config=replay).counts == (0, 0, 5)
    assert journaled(target) == at_source(source)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 5)
    assert journaled(target) == at_source(source)


def test_a_day_knows_the_rows_of_its_hours_and_each_hour_those_of_its_day(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    day = hour.replace(hour=0) - 24 * HOUR
    five, six = day + 5 * HOUR, day + 6 * HOUR
    hourly = export_of("events", target, day, start=day)
    daily = export_of("events", target, day, start=day.date(), name="daily", table="events", interval="day")
    source.insert("events", event(five), event(six))
    assert run(hourly, partition_key(five)).counts == (1, 0, 0)
    assert run(daily, f"{day:%Y-%m-%d}").counts == (1, 0, 1)
    source.insert("events", event(five), event(six))
    assert run(hourly, partition_key(six)).counts == (1, 0, 1)
    assert run(hourly, partition_key(five)).counts == (1, 0, 1)
    assert run(daily, f"{day:%Y-%m-%d}").counts == (0, 0, 4)
    target.execute("DELETE FROM pg_exports_keys WHERE interval_end - interval_start = '1 hour'")
    source.insert("events", event(five))
    assert run(daily, f"{day:%Y-%m-%d}").counts == (1, 0, 4)
    assert run(hourly, partition_key(five), partition_key(six)).counts == (0, 0, 5)
    assert each_once(source, target)


def test_rows_that_were_there_before_are_recognised_when_their_events_arrive_late(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    late = event(hour)
    target.execute(
        "CREATE TABLE events (uuid text, event text, distinct_id text, team_id bigint)",
        f"INSERT INTO events VALUES ('{late['uuid']}', '$pageview', 'a', {TEAM})",
        "GRANT INSERT, SELECT ON events TO exporter",
    )
    source.insert("events", event(hour), event(hour + HOUR))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    source.insert("events", late)
    assert run(export, partition_key(hour)).counts == (0, 0, 2)
    assert run(export, partition_key(hour + HOUR)).counts == (1, 0, 0)
    assert each_once(source, target)


def test_the_log_gives_the_index_that_questions_for_keys_lack(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(
        'CREATE TABLE "The Events" (uuid text, event text, distinct_id text)',
        """INSERT INTO "The Events" VALUES ('an older one', 'by hand', 'a')""",
        # An index that leaves rows out, and one that is sorted by another column first, answer no such question.
        'CREATE INDEX ON "The Events" (uuid) WHERE event IS NULL',
        'CREATE INDEX ON "The Events" (event, uuid)',
        'GRANT INSERT, SELECT ON "The Events" TO exporter',
    )
    source.insert("events", event(hour), event(hour + HOUR))
    export = export_of("events", target, hour, table="The Events")
    [advice] = [line for line in run(export, partition_key(hour)).log if ADVICE in line]
    statement = advice.partition("If that takes long: ")[2]
    assert statement == f'CREATE INDEX ON "{target.schema}"."The Events" USING hash ("uuid");'
    target.execute(statement)
    assert ADVICE not in " ".join(run(export, partition_key(hour + HOUR)).log)
    assert target.count("The Events") == 3


# Several exports into one table


def of(name: str, target: Target, hour: datetime) -> PostgresExport:
    """An export of one kind of event into the table that others write to as well."""
    return export_of("events", target, hour, name=name, table="events", include_events=[name])


def run_together(source: Source, target: Target, key: str, *exports: PostgresExport) -> bool:
    """Whether one run of all the exports succeeds."""
    postgres = target.resource()
    resources = {
        "clickhouse": source.resource(),
        "postgres": postgres,
        "postgres_io_manager": PostgresIOManager(postgres=postgres),
    }
    mine = dg.Definitions(resources=resources, executor=dg.in_process_executor)
    job = dg.Definitions.merge(*(export.build_defs(None) for export in exports), mine)
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, partition_key=key, raise_on_error=False
        )
    return result.success


def test_exports_of_different_events_into_one_table_may_run_in_one_run(
    source: Source, target: Target, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "aab"))
    assert run_together(source, target, partition_key(hour), of("a", target, hour), of("b", target, hour))
    assert each_once(source, target)


def test_journals_that_one_export_made_whole_again_are_not_those_of_another(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "aab"))
    for name in "ab":
        run(of(name, target, hour), partition_key(hour))
    target.execute("DELETE FROM pg_exports_keys")
    for name, counts in (("b", (1, 0, 1)), ("a", (1, 0, 2))):
        source.insert("events", event(hour, event=name))
        assert run(of(name, target, hour), partition_key(hour)).counts == counts
    assert each_once(source, target)


def test_rows_that_did_not_stay_are_sent_again_whatever_another_export_did_since(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour, event=name) for name in "aab"))
    run(of("a", target, hour), partition_key(hour - HOUR))
    target.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$"
        "BEGIN IF NEW.event = 'a' THEN RETURN NULL; END IF; RETURN NEW; END$$",
        "CREATE TRIGGER swallow BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION swallow()",
    )
    assert "reconciliation" in (run(of("a", target, hour), partition_key(hour)).error or "")
    assert run(of("b", target, hour), partition_key(hour)).counts == (1, 0, 0)
    target.execute("DROP TRIGGER swallow ON events")
    assert run(of("a", target, hour), partition_key(hour)).counts == (2, 0, 0)
    assert each_once(source, target)
