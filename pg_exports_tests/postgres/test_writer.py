"""The way that an interval takes: what its re-runs cost and bring, whatever happens to the table between them."""

import contextlib
import re
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import HOUR, event, export_of, mapping, person

REPLAY = {"ops": {"events": {"config": {"replay": True}}}}


@contextlib.contextmanager
def statements(target: Target) -> Iterator[list[str]]:
    """What the exports' role says to Postgres during the block, from the server's log."""
    said: list[str] = []
    with target.sandbox.postgres.log.open() as log:
        log.seek(0, 2)
        yield said
        entries = re.split(r"^\d{4}-\d\d-\d\d [\d:.]+ UTC ", log.read(), flags=re.MULTILINE)
    said += [entry for entry in entries if f" {ROLE}@" in entry]


def rows_read(target: Target) -> int:
    """Rows of the table that scans and indexes have read until now."""
    # A session tells when it ends.
    eventually(lambda: not target.rows(f"SELECT FROM pg_stat_activity WHERE usename = '{ROLE}'"))
    [(rows,)] = target.rows(
        "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables WHERE relid = 'events'::regclass"
    )
    return int(rows)


def each_once(source: Source, target: Target, table: str = "events") -> bool:
    """Whether the table has every event of ClickHouse's, once."""
    different = {event_id for (event_id,) in source.rows("SELECT DISTINCT toString(uuid) FROM events")}
    landed = [str(event_id) for (event_id,) in target.rows(f"SELECT uuid FROM {table}")]
    return len(landed) == len(different) and set(landed) == different


# What a re-run costs


def test_an_unchanged_interval_costs_one_query_that_reads_no_properties_and_sends_nothing(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour) for _ in range(50)))
    export = export_of("events", target, hour)
    run(export, partition_key(hour), partition_key(hour + HOUR))
    asked, read = len(source.columns_read("events")), rows_read(target)
    with statements(target) as said:
        assert run(export, partition_key(hour)).counts == (0, 0, 50)
        assert run(export, partition_key(hour + HOUR)).counts == (0, 0, 0)
    # The empty interval is asked for its fingerprint too.
    queries = source.columns_read("events")[asked:]
    assert len(queries) == 2
    assert all("uuid" in columns and not {"properties", "person_properties"} & columns for columns in queries)
    assert any("pg_exports_ledger" in statement for statement in said)
    assert not any("FROM STDIN" in statement or "CREATE" in statement for statement in said)
    # One row each, to see whether there are any.
    assert rows_read(target) - read <= 2


def test_a_changed_interval_sends_what_is_missing_and_does_not_read_the_table(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour) for _ in range(50)))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    # Each session that asks whether there are rows reads one.
    read = rows_read(target)
    source.insert("events", event(hour, timestamp=hour - 40 * 24 * HOUR))
    with statements(target) as said:
        changed = run(export, partition_key(hour))
    assert changed.counts == (1, 0, 50)
    assert changed.metadata[partition_key(hour)]["bytes"] < 2_000
    copies = [statement for statement in said if 'COPY "' in statement and "FROM STDIN" in statement]
    assert len(copies) == 1
    assert '"events"' in copies[0]
    assert rows_read(target) - read <= 2
    # As it would be if it did: without journals the table is read as a whole.
    target.execute("DELETE FROM pg_exports_keys")
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 51)
    # PostgreSQL 14 brings its statistics a little later.
    eventually(lambda: rows_read(target) - read > 50)


def test_a_rejected_row_is_tried_again_by_each_rerun_and_lands_once_it_can(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour, event="x" * 201))
    export = export_of("events", target, hour)
    for expected in ((1, 0, 0), (0, 0, 1)):
        tried = run(export, partition_key(hour))
        assert (tried.counts, tried.metadata[partition_key(hour)]["rows_rejected"]) == (expected, 1)
    assert target.rows("SELECT resolved_at IS NULL FROM pg_exports_rejected") == [(True,)]
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE text")
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    assert target.rows("SELECT resolved_at IS NULL FROM pg_exports_rejected") == [(False,)]
    asked = len(source.columns_read("events"))
    assert run(export, partition_key(hour)).counts == (0, 0, 2)
    assert len(source.columns_read("events")) == asked + 1
    assert each_once(source, target)


def test_a_rejected_row_that_another_export_brought_is_resolved(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour, event="x" * 201))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    target.execute("ALTER TABLE events ALTER COLUMN event TYPE text")
    assert run(export_of("events", target, hour, name="other", table="events"), partition_key(hour)).counts == (1, 0, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert target.rows("SELECT resolved_at IS NULL FROM pg_exports_rejected") == [(False,)]


# Rows that were deleted by hand


def test_rows_that_were_deleted_by_hand_come_back_by_a_replay_and_not_otherwise(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    kept, deleted = event(hour), event(hour)
    source.insert("events", kept, deleted, event(hour - HOUR))
    export = export_of("events", target, hour)
    run(export, partition_key(hour - HOUR), partition_key(hour))
    target.execute(f"DELETE FROM events WHERE uuid <> '{kept['uuid']}'")
    assert run(export, partition_key(hour)).counts == (0, 0, 2)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 2)
    assert target.count("events") == 2
    assert run(export, partition_key(hour), run_config=REPLAY).counts == (1, 0, 2)
    both = run(export, partition_key(hour - HOUR), partition_key(hour), run_config=REPLAY)
    assert both.counts == (1, 0, 3)
    assert each_once(source, target)
    # What a replay wrote is known afterwards.
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert each_once(source, target)


def test_a_replay_of_merged_models_brings_deleted_rows_back_as_any_rerun_does(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("person", person(hour, uuid.UUID(int=1), 1))
    source.insert("person_distinct_id2", *(mapping(hour, name, uuid.UUID(int=1)) for name in "ab"))
    export = export_of("persons", target, hour)
    run(export, partition_key(hour))
    replay = {"ops": {"persons": {"config": {"replay": True}}}}
    for name, config in (("a", None), ("b", replay)):
        target.execute(f"DELETE FROM persons WHERE distinct_id = '{name}'")
        assert run(export, partition_key(hour), run_config=config).counts == (1, 0, 1)


# The table between two runs


def test_a_table_that_was_made_anew_is_asked_for_the_rows_that_it_has(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour)
    run(export, partition_key(hour))
    target.execute("CREATE TABLE copied AS SELECT * FROM events LIMIT 1", "DROP TABLE events")
    assert run(export, partition_key(hour)).counts == (2, 0, 0)
    target.execute("DROP TABLE events", "ALTER TABLE copied RENAME TO events")
    target.execute(f"GRANT INSERT, SELECT ON events TO {ROLE}")
    assert run(export, partition_key(hour)).counts == (1, 0, 1)
    # Rewriting a table changes what it is known by, and none of its rows.
    target.execute("VACUUM FULL events")
    source.insert("events", event(hour), event(hour + HOUR))
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).counts == (2, 0, 2)
    assert each_once(source, target)


JUNE, JULY, AUGUST = (datetime.fromisoformat(f"2026-0{month}-15T12:00:00+00:00") for month in (6, 7, 8))
BY_MONTH = (
    'CREATE TABLE events (uuid text, event text, "timestamp" timestamptz, distinct_id text, team_id int)'
    ' PARTITION BY RANGE ("timestamp")',
    "CREATE TABLE june PARTITION OF events FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')",
    "CREATE TABLE july PARTITION OF events FOR VALUES FROM ('2026-07-01') TO ('2026-08-01')",
    "CREATE TABLE others PARTITION OF events DEFAULT",
    # An export needs nothing on the partitions themselves.
    f"GRANT INSERT, SELECT ON events TO {ROLE}",
)


def by_partition(target: Target) -> dict[str, int]:
    rows = target.rows("SELECT tableoid::regclass::text, count(*) FROM events GROUP BY 1")
    return {str(partition): int(count) for partition, count in rows}


def test_a_partitioned_table_loses_nothing_and_has_nothing_twice_when_it_is_truncated_in_whole_or_in_part(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    export = export_of("events", target, hour)
    source.insert("events", *(event(hour, timestamp=moment) for moment in (JUNE, JULY, JULY, AUGUST)))
    assert run(export, partition_key(hour)).counts == (4, 0, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, 4)
    source.insert("events", event(hour, timestamp=AUGUST))
    assert run(export, partition_key(hour)).counts == (1, 0, 4)
    target.execute("TRUNCATE july")
    assert run(export, partition_key(hour)).counts == (2, 0, 3)
    assert by_partition(target) == {"june": 1, "july": 2, "others": 2}
    target.execute("TRUNCATE events")
    assert run(export, partition_key(hour)).counts == (5, 0, 0)
    assert run(export, partition_key(hour)).counts == (0, 0, 5)
    assert each_once(source, target)


def test_partitions_may_be_added_taken_away_and_dropped(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    export = export_of("events", target, hour)
    source.insert("events", *(event(hour, timestamp=moment) for moment in (JUNE, JULY, AUGUST)))
    run(export, partition_key(hour))
    target.execute(
        "CREATE TABLE august (LIKE events)",
        "WITH moved AS (DELETE FROM others RETURNING *) INSERT INTO august SELECT * FROM moved",
        "ALTER TABLE events ATTACH PARTITION august FOR VALUES FROM ('2026-08-01') TO ('2026-09-01')",
    )
    source.insert("events", event(hour, timestamp=AUGUST))
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert by_partition(target) == {"june": 1, "july": 1, "august": 2}
    # Rows of a partition that has gone are missing: the default partition takes them.
    target.execute("ALTER TABLE events DETACH PARTITION june", "DROP TABLE july")
    assert run(export, partition_key(hour)).counts == (2, 0, 2)
    assert by_partition(target) == {"others": 2, "august": 2}
    target.execute("DROP TABLE others")
    refused = run(export, partition_key(hour))
    assert 'no partition of "events"' in (refused.error or "")
    assert by_partition(target) == {"august": 2}


def test_a_partition_that_was_truncated_is_filled_again_by_each_of_the_exports_that_had_rows_in_it(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    both = [export_of("events", target, hour, name=name, table="events", include_events=[name]) for name in ("a", "b")]
    source.insert("events", *(event(hour, event=name, timestamp=JUNE) for name in "aab"))
    for export in both:
        run(export, partition_key(hour))
    target.execute("TRUNCATE june")
    assert [run(export, partition_key(hour)).counts[0] for export in both] == [2, 1]
    assert each_once(source, target)


# Once in the whole table


def test_an_event_of_two_intervals_lands_once_in_a_table_that_deduplicates(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    settings: dict[str, Any] = {"deduplicate": "table"}
    again = event(hour)
    source.execute("SYSTEM STOP MERGES events")
    source.insert("events", again, event(hour))
    source.insert("events", again | {"inserted_at": hour + HOUR, "_timestamp": hour + HOUR}, event(hour + HOUR))
    export = export_of("events", target, hour, **settings)
    # The later one first: the order does not matter.
    runs = [run(export, partition_key(moment)) for moment in (hour + HOUR, hour)]
    assert [done.counts for done in runs] == [(2, 0, 0), (1, 0, 1)]
    assert each_once(source, target)
    # It was made with the index that each load needs.
    assert target.rows("SELECT indexdef LIKE '%USING hash (uuid)' FROM pg_indexes WHERE tablename = 'events'") == [
        (True,)
    ]
    assert not any("is asked for keys" in line for done in runs for line in done.log)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).counts == (1, 0, 4)
    assert each_once(source, target)


def test_a_table_without_an_index_that_deduplicates_is_given_the_statement(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour))
    run(export_of("events", target, hour), partition_key(hour))
    source.insert("events", event(hour + HOUR))
    once = export_of("events", target, hour, deduplicate="table")
    said = " ".join(run(once, partition_key(hour + HOUR)).log)
    assert f'CREATE INDEX ON "{target.schema}"."events" USING hash ("uuid");' in said
