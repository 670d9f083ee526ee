"""Exports through PgBouncer in transaction mode, where each transaction may come to another of the server's processes; and
what it refuses, which passes.
"""

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from pg_exports import PostgresResource, connection_check
from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres import io_manager
from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, MIDDLE, ROWS, eventually, fill, landed
from pg_exports_tests.postgres.pgbouncer import pgbouncer
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.postgres.test_io_manager import row_count
from pg_exports_tests.postgres.test_role_settings import settings_of
from pg_exports_tests.source_rows import event, export_of, mapping, person
from pg_exports_tests.test_connection_check import setup_of

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def port(sandbox: Sandbox) -> Iterator[int]:
    """Of a PgBouncer that has two connections to the server."""
    with pgbouncer(sandbox, pool_size=2) as running:
        yield running.port


@pytest.fixture
def through_pgbouncer(target: Target, port: int) -> PostgresResource:
    return target.resource(port=port)


def test_a_first_load_a_rerun_and_a_range_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime, through_pgbouncer: PostgresResource
) -> None:
    source.insert("events", *(event(hour - n * HOUR) for n in range(3)))
    export = export_of("events", target, hour)
    first = run(export, partition_key(hour), postgres=through_pgbouncer)
    assert (first.error, first.counts) == (None, (1, 0, 0))
    source.insert("events", event(hour))
    again = run(export, partition_key(hour), postgres=through_pgbouncer)
    assert (again.error, again.counts) == (None, (1, 0, 1))
    both = run(export, partition_key(hour - 2 * HOUR), partition_key(hour), postgres=through_pgbouncer)
    assert (both.error, both.counts) == (None, (2, 0, 2))
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(4, 4)]


def test_a_newer_person_replaces_the_older_one(
    source: Source, target: Target, run: RunExport, hour: datetime, through_pgbouncer: PostgresResource
) -> None:
    person_id = uuid.uuid4()
    export = export_of("persons", target, hour)
    source.insert("person_distinct_id2", mapping(hour, "a", person_id))
    for version, counts in ((1, (1, 0, 0)), (2, (0, 1, 0))):
        source.insert("person", person(hour, person_id, version))
        done = run(export, partition_key(hour), postgres=through_pgbouncer)
        assert (done.error, done.counts) == (None, counts)
    assert target.rows("SELECT distinct_id, person_version FROM persons") == [("a", 2)]


def test_more_runs_at_the_same_moment_than_there_are_connections_leave_each_row_once(
    source: Source, target: Target, run: RunExport, hour: datetime, through_pgbouncer: PostgresResource
) -> None:
    source.insert("events", *(event(hour) for _ in range(100)), event(hour - HOUR))
    export = export_of("events", target, hour)
    keys = [partition_key(hour)] * 3 + [partition_key(hour - HOUR)]
    with ThreadPoolExecutor(len(keys)) as threads:
        runs = list(threads.map(lambda key: run(export, key, postgres=through_pgbouncer), keys))
    assert [done.error for done in runs] == [None] * len(keys)
    assert sum(done.counts[0] for done in runs) == 101
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(101, 101)]


def test_a_downstream_asset_reads_the_table(
    source: Source, target: Target, run: RunExport, hour: datetime, through_pgbouncer: PostgresResource
) -> None:
    source.insert("events", event(hour), event(hour))
    export = export_of("events", target, hour)
    done = run(export, partition_key(hour), postgres=through_pgbouncer, downstream=[row_count(export)])
    assert done.error is None
    assert "2 rows" in " ".join(done.log)


def test_a_connection_that_freezes_in_mid_copy_is_made_again_and_each_row_lands_once(
    source: Source, target: Target, run: RunExport, hour: datetime, port: int
) -> None:
    fill(source, hour)
    with tcp_proxy(port) as proxy:
        is_frozen = proxy.after(MIDDLE, proxy.freeze)
        through_both = target.resource(port=proxy.port, read_timeout=2)
        done = run(export_of("events", target, hour), partition_key(hour), postgres=through_both)
        assert is_frozen.is_set()
    assert (done.error, done.counts) == (None, (ROWS, 0, 0))
    assert landed(target) == EACH_ROW_ONCE


# What it refuses

REFUSALS = {
    "its clients": ({"max_client_conn": 1}, "no more connections allowed (max_client_conn)"),
    "its pool": ({"default_pool_size": 1, "query_wait_timeout": 1}, "query_wait_timeout"),
    "the role": ({"server_login_retry": 1}, "too many connections for role"),
    "the server": ({"server_login_retry": 1, "query_wait_timeout": 1}, "server_login_retry"),
}
"""What has no room, by PgBouncer's settings and its words."""


@contextlib.contextmanager
def no_room(refusal: str, target: Target, resource: PostgresResource, server: TcpProxy) -> Iterator[None]:
    """Have PgBouncer refuse, for as long as the block lasts."""
    if refusal == "the role":
        target.sandbox.postgres.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
        try:
            yield
        finally:
            target.sandbox.postgres.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    elif refusal == "the server":
        with resource.session():
            server.refuse()
            server.cut()
        yield
        server.accept()
    else:
        with resource.session() as session, session.transaction():
            yield


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_run_that_pgbouncer_refuses_is_tried_again_and_completes_when_there_is_room(
    source: Source, target: Target, run: RunExport, hour: datetime, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than `server_login_retry`, as ever.
    monkeypatch.setattr(io_manager, "RETRIES", io_manager.RETRIES._replace(delay=0.5))
    source.insert("events", event(hour), event(hour))
    settings, words = REFUSALS[refusal]
    with tcp_proxy(target.sandbox.postgres.port) as server, ThreadPoolExecutor() as threads:
        behind = dataclasses.replace(
            target.sandbox, postgres=dataclasses.replace(target.sandbox.postgres, port=server.port)
        )
        with pgbouncer(behind, pool_size=2, settings=settings) as pooler:
            resource = target.resource(port=pooler.port)
            with no_room(refusal, target, resource, server):
                future = threads.submit(run, export_of("events", target, hour), partition_key(hour), postgres=resource)
                eventually(lambda: words in pooler.log.read_text())
            done = future.result()
    assert (done.error, done.counts) == (None, (2, 0, 0))
    assert done.tries > 1
    assert words in " ".join(done.log) + " ".join(str(one.event_specific_data) for one in done.events)


def test_a_run_whose_pgbouncer_ends_in_mid_copy_completes_through_the_next_one(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    with contextlib.ExitStack() as opened, ThreadPoolExecutor() as threads:
        pooler = opened.enter_context(pgbouncer(target.sandbox, pool_size=2))
        proxy = opened.enter_context(tcp_proxy(pooler.port))

        def end() -> None:
            pooler.process.terminate()
            pooler.process.wait()

        is_ended = proxy.after(MIDDLE, end)
        resource = target.resource(port=proxy.port)
        future = threads.submit(run, export_of("events", target, hour), partition_key(hour), postgres=resource)
        assert is_ended.wait(30)
        opened.enter_context(pgbouncer(target.sandbox, pool_size=2, port=pooler.port))
        done = future.result()
    assert (done.error, done.counts) == (None, (ROWS, 0, 0))
    assert done.tries > 1
    assert landed(target) == EACH_ROW_ONCE


def test_a_statement_that_pgbouncer_ends_names_its_timeout(target: Target) -> None:
    def take_too_long(resource: PostgresResource) -> None:
        with resource.session() as session, session.transaction():
            session.rows("SELECT pg_sleep(10)", doing="sleeping")

    with (
        pgbouncer(target.sandbox, pool_size=1, settings={"query_timeout": 1}) as pooler,
        pytest.raises(PassingError, match="raise PgBouncer's query timeout"),
    ):
        take_too_long(target.resource(port=pooler.port))


@pytest.mark.parametrize("changes", [{"password": "wrong"}, {"user": "nobody"}, {"database": "missing"}], ids=str)
def test_a_login_that_pgbouncer_refuses_for_good_is_not_tried_again(
    target: Target, port: int, changes: dict[str, str]
) -> None:
    with pytest.raises(DestinationError, match="POSTGRES_USER"), target.resource(port=port, **changes).session():
        pass


@pytest.mark.parametrize("ignored", ["extra_float_digits", "options"])
def test_the_check_names_who_may_create_where_names_are_looked_up_before_a_transaction(
    sandbox: Sandbox, target: Target, sample: Source, ignored: str
) -> None:
    target.execute(f"GRANT CREATE ON SCHEMA {target.schema} TO PUBLIC")
    path = {"search_path": f"{target.schema}, pg_catalog"}
    with (
        settings_of(f"ROLE {ROLE}", sandbox, path),
        pgbouncer(sandbox, pool_size=1, settings={"ignore_startup_parameters": ignored}) as pooler,
    ):
        pooled = target.resource(port=pooler.port)
        steps = list(connection_check.steps(setup_of("events", target.schema), sample.resource(), pooled))
        [warning] = [step.text for step in steps if (step.status, step.name) == ("warning", "Postgres, login")]
        assert f'"{target.schema}" before a transaction begins, and PUBLIC may create functions there' in warning
        assert f'ALTER ROLE "{ROLE}" SET search_path = pg_catalog, pg_temp;' in warning
        direct = list(connection_check.steps(setup_of("events", target.schema), sample.resource(), target.resource()))
        assert not [step for step in direct if (step.status, step.name) == ("warning", "Postgres, login")]
