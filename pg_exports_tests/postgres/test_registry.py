"""The registry: a table that has changed is taken for the one that it was if it has its rows, and else for another one."""

import subprocess
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports.postgres import registry
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually, with_own_postgres
from pg_exports_tests.source_rows import BY_MONTH, HOUR, event, export_of, mapping, person
from pg_exports_tests.test_late_rows import asked

REWRITES = [
    "VACUUM FULL events",
    "CLUSTER events USING by_uuid",
    "ALTER TABLE events ALTER COLUMN event TYPE text",
    "ALTER TABLE events SET TABLESPACE elsewhere",
]

OWN: Any = {
    "name": "visits",
    "query": "SELECT toString(uuid) AS uuid, event, distinct_id FROM events "
    "WHERE inserted_at >= {interval_start} AND inserted_at < {interval_end}",
    "columns": {"uuid": "TEXT", "event": "TEXT", "distinct_id": "TEXT"},
    "key": ["uuid"],
}


@pytest.fixture
def tablespace(sandbox: Sandbox, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tablespace called `elsewhere`."""
    folder = sandbox.postgres.folder / f"elsewhere_{target.schema}"
    sandbox.postgres.execute(f"COPY (SELECT 1) TO PROGRAM 'mkdir -p {folder}'")
    sandbox.postgres.execute(f"CREATE TABLESPACE elsewhere LOCATION '{folder}'")
    yield
    target.execute("DROP TABLE events")
    sandbox.postgres.execute("DROP TABLESPACE elsewhere")


def each_once(target: Target, rows: int) -> bool:
    return target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(rows, rows)]


@pytest.mark.parametrize("statement", REWRITES)
@pytest.mark.usefixtures("tablespace")
def test_a_rewritten_table_is_the_one_that_it_was_and_rows_deleted_by_hand_stay_deleted(
    source: Source, target: Target, run: RunExport, hour: datetime, statement: str
) -> None:
    rows = [event(hour) for _ in range(6)]
    source.insert("events", *rows)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (6, 0, 0)
    target.execute(
        "CREATE INDEX by_uuid ON events (uuid)", f"DELETE FROM events WHERE uuid = '{rows[0]['uuid']}'", statement
    )
    assert run(export, partition_key(hour)).counts == (0, 0, 6)
    source.insert("events", event(hour), event(hour + HOUR))
    ran = run(export, partition_key(hour), partition_key(hour + HOUR))
    assert ran.counts == (2, 0, 6)
    assert each_once(target, 7)
    # New hours go straight in: the table is not compared with.
    assert target.rows("SELECT bool_or(rows_before) FROM pg_exports_ledger") == [(False,)]
    assert target.rows("SELECT count(DISTINCT (table_oid, table_filenode)) FROM pg_exports_ledger") == [(1,)]


def test_a_rewritten_partition_is_the_one_that_it_was(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    june = datetime.fromisoformat("2026-06-15T12:00:00+00:00")
    rows = [event(hour, timestamp=june) for _ in range(4)]
    source.insert("events", *rows, event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (5, 0, 0)
    target.execute("VACUUM FULL june")
    assert run(export, partition_key(hour)).counts == (0, 0, 5)
    source.insert("events", event(hour, timestamp=june))
    assert run(export, partition_key(hour)).counts == (1, 0, 5)
    assert each_once(target, 6)
    assert target.rows("SELECT rows_before FROM pg_exports_tables WHERE slot = 0") == [(False,)]


@pytest.mark.parametrize(
    "statements",
    [
        ("TRUNCATE events",),
        ("TRUNCATE events", "VACUUM FULL events"),
        ("DELETE FROM events", "VACUUM FULL events"),
        # As many rows as before, and others: whoever fills a table by hand need not think of this.
        (
            "CREATE TABLE copied AS SELECT * FROM events",
            "TRUNCATE events",
            "INSERT INTO events (uuid, event, distinct_id, team_id, timestamp)"
            " SELECT gen_random_uuid(), event, distinct_id, team_id, timestamp FROM copied",
        ),
    ],
    ids=["truncated", "truncated and rewritten", "emptied and rewritten", "filled with others"],
)
def test_a_table_without_its_rows_is_another_one(
    source: Source, target: Target, run: RunExport, hour: datetime, statements: tuple[str, ...]
) -> None:
    rows = [event(hour) for _ in range(4)]
    source.insert("events", *rows)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (4, 0, 0)
    target.execute(*statements)
    assert run(export, partition_key(hour)).counts == (4, 0, 0)
    names = ", ".join(f"'{row['uuid']}'" for row in rows)
    assert target.rows(f"SELECT count(*), count(DISTINCT uuid) FROM events WHERE uuid IN ({names})") == [(4, 4)]
    assert run(export, partition_key(hour)).counts == (0, 0, 4)


@pytest.fixture
def clusters(sandbox: Sandbox, source: Source) -> Iterator[tuple[Target, Target]]:
    """Two clusters that were set up alike."""
    with with_own_postgres(sandbox) as first, with_own_postgres(sandbox) as second:
        yield Target(first, "public"), Target(second, "public")


def script_of(target: Target, *options: str) -> str:
    server = target.sandbox.postgres
    command = [str(server.binaries / "pg_dump"), "-d", server.admin_uri_of(DATABASE), *options]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # pg_dump sets what servers before 17 do not have, if it is newer itself.
    return script.replace("SET transaction_timeout = 0;\n", "")


def restore(target: Target, script: str) -> None:
    server = target.sandbox.postgres
    command = [str(server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", server.admin_uri_of(DATABASE)]
    subprocess.run(command, input=script, capture_output=True, text=True, check=True)


OF_EXPORTS = ("pg_exports_ledger", "pg_exports_keys", "pg_exports_rejected", "pg_exports_tables")


def identity(target: Target) -> tuple[int, int]:
    [(oid, filenode)] = target.rows("SELECT oid::bigint, relfilenode::bigint FROM pg_class WHERE relname = 'events'")
    return int(oid), int(filenode)


@pytest.mark.parametrize("with_rows", [False, True], ids=["without its rows", "with its rows"])
def test_a_table_restored_into_a_cluster_set_up_alike_is_known_by_its_rows_not_by_its_numbers(
    source: Source, clusters: tuple[Target, Target], run: RunExport, hour: datetime, with_rows: bool
) -> None:
    first, second = clusters
    source.insert("events", *(event(hour) for _ in range(5)))
    for target in clusters:
        assert run(
            export_of("events", target, hour), partition_key(hour - HOUR), postgres=target.resource()
        ).counts == (
            0,
            0,
            0,
        )
    export = export_of("events", first, hour)
    assert run(export, partition_key(hour), postgres=first.resource()).counts == (5, 0, 0)
    assert identity(first) == identity(second)
    tables = [*OF_EXPORTS, *(["events"] if with_rows else [])]
    second.execute(*(f"DELETE FROM {table}" for table in OF_EXPORTS))
    restore(second, script_of(first, "--data-only", *(f"--table=public.{table}" for table in tables)))
    ran = run(export, partition_key(hour), postgres=second.resource())
    assert ran.counts == ((0, 0, 5) if with_rows else (5, 0, 0))
    assert each_once(second, 5)
    source.insert("events", event(hour))
    assert run(export, partition_key(hour), postgres=second.resource()).counts == (1, 0, 5)
    assert each_once(second, 6)
    # The one that the dump is from goes on as before.
    assert run(export, partition_key(hour), postgres=first.resource()).counts == (1, 0, 5)


def test_a_partitioned_table_restored_without_a_partitions_rows_loads_them_again(
    source: Source, clusters: tuple[Target, Target], run: RunExport, hour: datetime
) -> None:
    first, second = clusters
    june = datetime.fromisoformat("2026-06-15T12:00:00+00:00")
    for target in clusters:
        target.execute(*BY_MONTH)
        ran = run(export_of("events", target, hour), partition_key(hour - HOUR), postgres=target.resource())
        assert ran.counts == (0, 0, 0)
    source.insert("events", *(event(hour, timestamp=june) for _ in range(3)), event(hour), event(hour))
    export = export_of("events", first, hour)
    assert run(export, partition_key(hour), postgres=first.resource()).counts == (5, 0, 0)
    assert identity(first) == identity(second)
    second.execute(*(f"DELETE FROM {table}" for table in OF_EXPORTS))
    tables = (f"--table=public.{table}" for table in (*OF_EXPORTS, "others"))
    restore(second, script_of(first, "--data-only", *tables))
    assert run(export, partition_key(hour), postgres=second.resource()).counts == (3, 0, 2)
    assert each_once(second, 5)


def test_a_plain_table_in_the_place_of_a_partitioned_one_is_compared_with(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    source.insert("events", *(event(hour) for _ in range(3)))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    target.execute(
        "ALTER TABLE events RENAME TO parted",
        "CREATE TABLE events AS SELECT * FROM parted",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )
    source.insert("events", event(hour))
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert each_once(target, 4)
    # And back.
    target.execute("DROP TABLE events", "ALTER TABLE parted RENAME TO events")
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert each_once(target, 4)


# Rows that came by another way


Brought = Callable[[Target, list[dict[str, object]]], None]


def by_insert(target: Target, rows: list[dict[str, object]], table: str = "events") -> None:
    for row in rows:
        target.execute(
            f"INSERT INTO {table} (uuid, event, distinct_id, team_id, timestamp)"
            f" VALUES ('{row['uuid']}', '{row['event']}', '{row['distinct_id']}', 1, now())"
        )


def by_copy_after_a_delete(target: Target, rows: list[dict[str, object]]) -> None:
    target.execute("DELETE FROM events WHERE uuid IN (SELECT uuid FROM events LIMIT 2)", "VACUUM events")
    by_insert(target, rows)


@pytest.mark.parametrize("bring", [by_insert, by_copy_after_a_delete])
def test_rows_that_were_copied_in_by_hand_between_two_runs_do_not_land_twice(
    source: Source, target: Target, run: RunExport, hour: datetime, bring: Brought
) -> None:
    source.insert("events", *(event(hour) for _ in range(3)))
    later = [event(hour + HOUR) for _ in range(4)]
    source.insert("events", *later)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    bring(target, later[:2])
    eventually(lambda: target.rows("SELECT pg_stat_get_tuples_inserted('events'::regclass)") == [(5,)])
    ran = run(export, partition_key(hour + HOUR))
    assert ran.counts == (2, 0, 2)
    assert any("came into" in line for line in ran.log)
    assert target.rows("SELECT count(*) - count(DISTINCT uuid) FROM events") == [(0,)]


def test_a_table_that_was_rewritten_after_rows_were_copied_in_is_the_one_that_it_was(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    rows = [event(hour) for _ in range(6)]
    later = [event(hour + HOUR) for _ in range(2)]
    source.insert("events", *rows, *later)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (6, 0, 0)
    target.execute(f"DELETE FROM events WHERE uuid = '{rows[0]['uuid']}'")
    by_insert(target, later[:1])
    target.execute("VACUUM FULL events")
    source.insert("events", event(hour))
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour + HOUR)).counts == (1, 0, 1)
    assert asked(export, source, target) == [partition_key(hour)]
    assert run(export, partition_key(hour)).counts == (1, 0, 6)
    assert each_once(target, 8)


def test_an_old_table_that_inherits_from_the_destination_is_compared_with(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    later = [event(hour + HOUR) for _ in range(3)]
    source.insert("events", event(hour), *later)
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    target.execute("CREATE TABLE old (LIKE events INCLUDING ALL)")
    by_insert(target, later[:2], "old")
    target.execute("ALTER TABLE old INHERIT events")
    assert run(export, partition_key(hour + HOUR)).counts == (1, 0, 2)
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert each_once(target, 4)


def test_an_old_table_attached_as_a_partition_is_compared_with(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    may = datetime.fromisoformat("2026-05-15T12:00:00+00:00")
    old = [event(hour, timestamp=may) for _ in range(3)]
    source.insert("events", event(hour - HOUR), *old, event(hour))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour - HOUR)).counts == (1, 0, 0)
    target.execute(
        "CREATE TABLE may (LIKE events)",
        *(
            "INSERT INTO may (uuid, event, distinct_id, team_id, timestamp)"
            f" VALUES ('{row['uuid']}', '{row['event']}', '{row['distinct_id']}', 1, '{may}')"
            for row in old
        ),
        "ALTER TABLE events ATTACH PARTITION may FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')",
    )
    assert run(export, partition_key(hour)).counts == (1, 0, 3)
    assert each_once(target, 5)


def test_runs_that_were_killed_and_rows_moved_between_partitions_are_not_taken_for_rows_of_others(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    target.execute(*BY_MONTH)
    may = datetime.fromisoformat("2026-05-15T12:00:00+00:00")
    source.insert("events", *(event(hour, timestamp=may) for _ in range(3)), event(hour + HOUR), event(hour + 2 * HOUR))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour)).counts == (3, 0, 0)
    target.execute("BEGIN", "INSERT INTO events (uuid, timestamp) VALUES ('x', now())", "ROLLBACK")
    assert run(export, partition_key(hour + HOUR)).counts == (1, 0, 0)
    target.execute(
        "CREATE TABLE may (LIKE events)",
        "WITH moved AS (DELETE FROM others WHERE timestamp < '2026-06-01' RETURNING *) INSERT INTO may SELECT * FROM moved",
        "ALTER TABLE events ATTACH PARTITION may FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')",
    )
    assert run(export, partition_key(hour + 2 * HOUR)).counts == (1, 0, 0)
    assert target.rows("SELECT rows_before FROM pg_exports_tables WHERE slot = 0") == [(False,)]


def test_a_ledger_that_was_emptied_lets_no_row_land_twice(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).counts == (2, 0, 0)
    target.execute("DELETE FROM pg_exports_ledger", "DELETE FROM pg_exports_keys")
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert run(export, partition_key(hour + HOUR)).counts == (0, 0, 1)
    assert each_once(target, 2)


def test_an_interval_whose_row_of_the_ledger_was_deleted_is_known_by_its_keys(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", event(hour), event(hour + HOUR))
    export = export_of("events", target, hour)
    assert run(export, partition_key(hour), partition_key(hour + HOUR)).counts == (2, 0, 0)
    target.execute(f"DELETE FROM pg_exports_ledger WHERE interval_start = '{hour}'")
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert each_once(target, 2)


# Models that share a table


def test_a_table_takes_the_rows_of_one_model(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    source.insert("events", *(event(hour) for _ in range(5)))
    assert run(export_of("events", target, hour), partition_key(hour)).counts == (5, 0, 0)
    own = PostgresExport(model=OWN, start=hour - HOUR, schema=target.schema, table="events")
    refused = run(own, partition_key(hour)).error or ""
    assert "holds the rows of the model events; this export's model is visits" in refused
    assert target.count("events") == 5
    target.execute(f"UPDATE {quoted(target.schema, 'pg_exports_tables')} SET model = 'visits'")
    assert run(own, partition_key(hour)).error is None


def test_an_own_model_whose_query_has_no_team_meets_its_rows_whatever_team_its_export_names(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    source.insert("events", *(event(hour) for _ in range(5)))
    for team_id in (None, 1, 2):
        export = PostgresExport(
            model=OWN, team_id=team_id, name=f"e{team_id}", start=hour - HOUR, schema=target.schema, table="events"
        )
        ran = run(export, partition_key(hour))
        assert ran.counts == ((5, 0, 0) if team_id is None else (0, 0, 5))
    assert target.count("events") == 5


def test_teams_share_a_table(source: Source, target: Target, run: RunExport, hour: datetime) -> None:
    source.insert("events", event(hour), event(hour, team_id=2))
    for team_id in (1, 2):
        export = PostgresExport(
            model="events", team_id=team_id, name=f"e{team_id}", start=hour - HOUR, schema=target.schema, table="events"
        )
        assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_a_merged_table_that_was_rewritten_goes_on(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    one = uuid.UUID(int=1)
    source.insert("person", person(hour, one, 1))
    source.insert("person_distinct_id2", mapping(hour, "a", one))
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour)).counts == (1, 0, 0)
    target.execute("VACUUM FULL persons")
    assert run(export, partition_key(hour)).counts == (0, 0, 1)
    assert target.rows("SELECT count(DISTINCT (table_oid, table_filenode)) FROM pg_exports_ledger") == [(1,)]


# What a snapshot had seen


@pytest.mark.parametrize(
    ("behind", "was_there"),
    [(10, True), (2**31 - 1000, True), (2**31 + 1000, True), (3 * 10**9, True), (-10, False), (-1000, False)],
    ids=["just now", "long ago", "frozen", "frozen long ago", "after it", "after the statement began"],
)
def test_a_row_was_there_or_not_however_many_transactions_ago_it_was_written(
    sandbox: Sandbox, behind: int, was_there: bool
) -> None:
    for _ in range(20):
        sandbox.postgres.execute("SELECT txid_current()")
    [(now,)] = sandbox.postgres.rows("SELECT txid_current()")
    snapshot = int(str(now)) - 15
    xmin = (snapshot - behind) % 2**32
    condition = registry.was_there("r").replace("$1", f"'{snapshot}:{snapshot}:'")
    row = f"(SELECT '{xmin}'::xid AS xmin) AS r"
    assert sandbox.postgres.rows(f"SELECT {condition} FROM {row}") == [(was_there,)]
