"""Settings that a role, a database or a server may have: none changes what lands, or breaks a wait that is promised."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
import pytest

from pg_exports import PostgresExport, PostgresResource
from pg_exports.errors import DestinationError, PassingError
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import eventually
from pg_exports_tests.postgres.pgbouncer import pgbouncer
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.source_rows import event, export_of, insert_sessions, mapping, new_session, person, session
from pg_exports_tests.test_concurrency import holding, waiting

ODD = {
    "TimeZone": "'Asia/Kolkata'",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "check_function_bodies": "off",
    "row_security": "off",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "lock_timeout": "'1ms'",
    "statement_timeout": "'10s'",
    "idle_in_transaction_session_timeout": "'2s'",
    "default_toast_compression": "pglz",
    "plan_cache_mode": "force_generic_plan",
    "work_mem": "'64kB'",
    "hash_mem_multiplier": "1",
    "gin_fuzzy_search_limit": "1",
}
"""What a role may set itself and might change what a statement does, each far from its default."""


@contextlib.contextmanager
def settings_of(whose: str, sandbox: Sandbox, settings: dict[str, str]) -> Iterator[None]:
    """Settings of a role or a database, for as long as the block lasts."""
    try:
        sandbox.postgres.execute(*(f"ALTER {whose} SET {name} = {value}" for name, value in settings.items()))
        yield
    finally:
        sandbox.postgres.execute(f"ALTER {whose} RESET ALL")


@pytest.fixture
def elsewhere(target: Target) -> Iterator[Target]:
    """A second schema of the test's own."""
    schema = f"{target.schema}_2"
    postgres_server.grant_export(target.sandbox.postgres, ROLE, DATABASE, schema)
    yield Target(target.sandbox, schema)
    target.sandbox.postgres.execute(f'DROP SCHEMA "{schema}" CASCADE', database=DATABASE)


def fill(source: Source, hour: datetime, version: int) -> None:
    """Rows of every model whose values a setting might change on the way; those of version 2 replace some."""
    odd = ("a\\b \\' é🦔", "it''s", "NULL", "31/01/2026", "\\x00")
    documents = ('{"$set": {"n": 1.50, "t": "a\\\\b"}, "$ip": "1.2.3.4"}', '{"a": "\\u0000"}', '{"n": 0.1}', "{}", "{}")
    rows = [
        event(hour, event=name, properties=document, uuid=uuid.UUID(int=100 * version + n))
        for n, (name, document) in enumerate(zip(odd, documents, strict=True))
    ]
    source.insert("events", *rows)
    source.insert("person", person(hour, uuid.UUID(int=1), version), person(hour, uuid.UUID(int=version), 5))
    source.insert("person_distinct_id2", *(mapping(hour, name, uuid.UUID(int=1), version) for name in odd[:version]))
    lasts = {"urls": [*odd, "a,b", 'c"d', "{}"], "vitals_lcp": 0.1 + 0.2, "entry_url": "https://a.b/\\c"}
    insert_sessions(source, session(new_session(hour), hour, **lasts))


def everything(target: Target) -> dict[str, list[tuple[Any, ...]]]:
    """What a schema holds, but for times, runs and the tables' identities."""
    tables = {
        "events": "SELECT *, properties::text FROM events ORDER BY uuid",
        "persons": "SELECT *, properties::text FROM persons ORDER BY distinct_id",
        "sessions": "SELECT * FROM sessions ORDER BY session_id",
        "ledger": "SELECT export, interval_start, interval_end, fingerprint, rows_at_source, rows_inserted, rows_updated,"
        " rows_unchanged, rows_repaired, rows_rejected, keys, bytes FROM pg_exports_ledger ORDER BY export",
        # Rows come from ClickHouse in any order.
        "keys": "SELECT export, encode(substring(keys FROM 8 * n + 1 FOR 8), 'hex')"
        " FROM pg_exports_keys, generate_series(0, length(keys) / 8 - 1) AS n ORDER BY 1, 2",
        "rejected": "SELECT export, key::text, column_name, reason, resolved_at IS NULL FROM pg_exports_rejected"
        " ORDER BY export, key::text",
    }
    return {table: target.rows(query) for table, query in tables.items()}


def reader(export: PostgresExport, frames: list[pl.DataFrame]) -> dg.AssetsDefinition:
    """A downstream asset that takes what the IO manager reads."""
    partitions = next(iter(export.build_defs(None).assets or [])).partitions_def  # type: ignore[union-attr]

    @dg.asset(partitions_def=partitions, io_manager_key="memory", resource_defs={"memory": dg.mem_io_manager})
    def downstream(events: pl.DataFrame) -> None:
        frames.append(events.sort("uuid"))

    return downstream


def test_no_setting_of_the_role_changes_what_lands_or_is_read(
    source: Source, target: Target, elsewhere: Target, run: RunExport, hour: datetime
) -> None:
    frames: list[pl.DataFrame] = []
    counts: dict[Target, list[tuple[int, int, int]]] = {target: [], elsewhere: []}
    known = {name for (name,) in target.rows("SELECT name FROM pg_settings")}
    odd = {name: value for name, value in ODD.items() if name in known}
    for version in (1, 2):
        fill(source, hour, version)
        for where, settings in ((target, {}), (elsewhere, odd)):
            with settings_of(f"ROLE {ROLE}", target.sandbox, settings):
                exports = [
                    export_of(model, where, hour, on_bad_rows="reject") for model in ("events", "persons", "sessions")
                ]
                for export in exports:
                    done = run(export, partition_key(hour))
                    assert done.error is None
                    counts[where].append(done.counts)
                assert not run(exports[0], partition_key(hour), downstream=[reader(exports[0], frames)]).error
    assert counts[target] == counts[elsewhere] == [(4, 0, 0), (1, 0, 0), (1, 0, 0), (4, 0, 4), (1, 1, 0), (1, 0, 1)]
    assert everything(target) == everything(elsewhere)
    assert frames[0].equals(frames[1])
    assert frames[2].equals(frames[3])


# Timeouts

TIMEOUT = 0.3
"""Seconds of the server's timeouts here."""


@pytest.fixture(params=["direct", "pgbouncer"])
def connection(request: pytest.FixtureRequest, target: Target) -> Iterator[Callable[[], PostgresResource]]:
    """The narrow role's connection, direct and through PgBouncer in transaction mode; made when the settings are there."""
    with contextlib.ExitStack() as opened:

        def connect() -> PostgresResource:
            if request.param == "direct":
                return target.resource()
            return target.resource(port=opened.enter_context(pgbouncer(target.sandbox, pool_size=2)).port)

        yield connect


@pytest.mark.parametrize("whose", [f"ROLE {ROLE}", f"DATABASE {DATABASE}"])
@pytest.mark.parametrize("timeout", ["statement_timeout", "transaction_timeout"])
def test_a_lock_and_a_merge_may_take_longer_than_the_servers_timeouts(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    connection: Callable[[], PostgresResource],
    whose: str,
    timeout: str,
) -> None:
    if not target.rows(f"SELECT FROM pg_settings WHERE name = '{timeout}'"):
        pytest.skip(f"PostgreSQL has {timeout} from 17 on")
    source.insert("person", person(hour, uuid.UUID(int=1), 1))
    source.insert("person_distinct_id2", mapping(hour, "a", uuid.UUID(int=1)))
    export = export_of("persons", target, hour)
    assert run(export, partition_key(hour.replace(minute=0))).counts == (1, 0, 0)
    source.insert("person", person(hour, uuid.UUID(int=1), 2))
    target.execute(
        f"CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep({2 * TIMEOUT}); RETURN new; END'",
        "CREATE TRIGGER wait BEFORE INSERT ON persons FOR EACH ROW EXECUTE FUNCTION wait()",
    )
    with (
        settings_of(whose, target.sandbox, {timeout: f"'{TIMEOUT}s'"}),
        ThreadPoolExecutor() as threads,
        holding(target, "SET statement_timeout = 0") as execute,
    ):
        if timeout == "transaction_timeout":
            execute("SET transaction_timeout = 0")
        execute("LOCK TABLE persons IN ACCESS EXCLUSIVE MODE")
        future = threads.submit(run, export, partition_key(hour), postgres=connection())
        eventually(lambda: waiting(target) == 1)
        time.sleep(2 * TIMEOUT)
        execute("COMMIT")
        done = future.result()
    assert (done.error, done.tries, done.counts) == (None, 1, (0, 1, 0))


def test_a_transaction_may_wait_for_its_next_statement_longer_than_the_servers_timeouts(target: Target) -> None:
    timeouts = {"idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout"}
    known = {name for (name,) in target.rows("SELECT name FROM pg_settings")}
    settings = dict.fromkeys(timeouts & known, f"'{TIMEOUT}s'")
    with settings_of(f"ROLE {ROLE}", target.sandbox, settings), target.resource().session() as session:
        time.sleep(2 * TIMEOUT)
        with session.transaction():
            time.sleep(2 * TIMEOUT)
            session.execute("SELECT pg_sleep($1)", 2 * TIMEOUT, doing="sleeping")
        time.sleep(2 * TIMEOUT)
        with session.transaction():
            assert session.rows("SELECT 1", doing="asking") == [(1,)]


def test_a_commit_is_durable_though_the_role_has_it_otherwise(target: Target) -> None:
    for setting, used in (("off", "on"), ("local", "local"), ("on", "on")):
        with (
            settings_of(f"ROLE {ROLE}", target.sandbox, {"synchronous_commit": setting}),
            target.resource().session() as session,
            session.transaction(),
        ):
            assert session.rows("SELECT current_setting('synchronous_commit')", doing="asking") == [(used,)]


def test_a_statement_timeout_that_ends_the_drivers_own_questions_is_tried_again_and_named(target: Target) -> None:
    with (
        settings_of(f"ROLE {ROLE}", target.sandbox, {"statement_timeout": "'1ms'"}),
        pytest.raises(PassingError, match=rf'ALTER ROLE "{ROLE}" SET statement_timeout = 0;'),
        target.resource().session(),
    ):
        pass


# What cannot be set otherwise


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("session_replication_role", "replica", "RESET session_replication_role"),
        ("quote_all_identifiers", "on", "SET quote_all_identifiers = off"),
    ],
)
def test_a_setting_that_would_change_what_lands_or_stops_the_driver_is_refused_by_name(
    target: Target, setting: str, value: str, remedy: str
) -> None:
    with (
        settings_of(f"ROLE {ROLE}", target.sandbox, {setting: value}),
        pytest.raises(DestinationError, match=remedy),
        target.resource().session() as session,
        session.transaction(),
    ):
        pass


def freeze_in_a_transaction(resource: PostgresResource, proxy: TcpProxy, processes: list[int]) -> None:
    with resource.session() as session, session.transaction():
        processes += [int(str(pid)) for (pid,) in session.rows("SELECT pg_backend_pid()", doing="asking")]
        proxy.freeze()
        session.rows("SELECT 1", doing="asking")


@pytest.mark.parametrize("settings", [{}, {"TimeZone": "'Asia/Kolkata'", "DateStyle": "SQL, DMY"}, {"role": "other"}])
def test_a_transaction_whose_connection_froze_is_ended_whatever_the_roles_settings(
    target: Target, settings: dict[str, str]
) -> None:
    server, processes = target.sandbox.postgres, list[int]()
    server.execute("CREATE ROLE other", f"GRANT other TO {ROLE}")
    try:
        with settings_of(f"ROLE {ROLE}", target.sandbox, settings), tcp_proxy(server.port) as proxy:
            resource = target.resource(port=proxy.port, read_timeout=1)
            with pytest.raises(PassingError, match="stopped answering"):
                freeze_in_a_transaction(resource, proxy, processes)
            [process] = processes
            eventually(lambda: not target.rows(f"SELECT FROM pg_stat_activity WHERE pid = {process}"), seconds=5)
    finally:
        server.execute("DROP ROLE other")
