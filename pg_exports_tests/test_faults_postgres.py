"""Faults between an export and Postgres: a run outlives those that pass, nothing partial is ever seen, and what could not
land lands with the next run, each row once.
"""

import contextlib
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from pg_exports.postgres import session
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.faults import (
    EACH_ROW_ONCE,
    INTERVAL,
    MIDDLE,
    NOTHING,
    ROWS,
    Hold,
    eventually,
    fill,
    fill_persons,
    held_before_commit,
    held_in_commit,
    landed,
    make_tables,
    with_own_postgres,
)
from pg_exports_tests.postgres.tcp_proxy import TcpProxy, tcp_proxy
from pg_exports_tests.source_rows import export_of

HOUR = timedelta(hours=1)


@pytest.fixture
def proxy(sandbox: Sandbox) -> Iterator[TcpProxy]:
    """In front of the session's Postgres."""
    with tcp_proxy(sandbox.postgres.port) as running:
        yield running


@pytest.fixture(scope="module")
def own_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with a Postgres that these tests may restart."""
    with with_own_postgres(sandbox) as running:
        yield running


@pytest.fixture
def own_target(own_sandbox: Sandbox) -> Iterator[Target]:
    """A schema in that Postgres."""
    schema = f"test_{uuid.uuid4().hex[:12]}"
    postgres_server.grant_export(own_sandbox.postgres, ROLE, DATABASE, schema)
    yield Target(own_sandbox, schema)
    own_sandbox.postgres.execute(f"DROP SCHEMA {quoted(schema)} CASCADE", database=DATABASE)


InBackground = Callable[..., "Future[Run]"]


@pytest.fixture
def in_background(run: RunExport) -> Iterator[InBackground]:
    """`run`, which gives a future."""
    with ThreadPoolExecutor() as threads:
        yield lambda *arguments, **options: threads.submit(run, *arguments, **options)


# The connection


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_a_connection_that_is_lost_in_mid_copy_is_made_again_and_each_row_lands_once(
    source: Source, target: Target, run: RunExport, hour: datetime, proxy: TcpProxy, fault: str
) -> None:
    fill(source, hour)
    seen: list[tuple[int, int, int]] = []

    def strike() -> None:
        seen.append(landed(target))
        getattr(proxy, fault)()

    proxy.after(MIDDLE, strike)
    done = run(
        export_of("events", target, hour),
        partition_key(hour),
        postgres=target.resource(port=proxy.port, read_timeout=2),
    )
    assert done.error is None
    assert done.counts == (ROWS, 0, 0)
    assert (seen, landed(target)) == ([NOTHING], EACH_ROW_ONCE)


def test_persons_whose_connection_is_lost_in_mid_copy_are_merged_once_and_leave_no_staging_table(
    source: Source, target: Target, run: RunExport, hour: datetime, proxy: TcpProxy
) -> None:
    fill_persons(source, hour)
    is_cut = proxy.after(MIDDLE, proxy.cut)
    done = run(export_of("persons", target, hour), partition_key(hour), postgres=target.resource(port=proxy.port))
    assert is_cut.is_set()
    assert (done.error, done.counts) == (None, (ROWS, 0, 0))
    assert target.rows("SELECT count(*), count(DISTINCT person_id) FROM persons") == [(ROWS, ROWS)]
    tables = target.rows(f"SELECT tablename FROM pg_tables WHERE schemaname = '{target.schema}'")
    assert not [name for (name,) in tables if "staging" in name]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_postgres_that_restarts_in_mid_copy_gets_each_row_once(
    source: Source, own_target: Target, in_background: InBackground, hour: datetime, mode: Literal["fast", "immediate"]
) -> None:
    fill(source, hour)
    server = own_target.sandbox.postgres
    with tcp_proxy(server.port) as proxy:
        is_copying = proxy.after(MIDDLE, proxy.freeze)
        done = in_background(
            export_of("events", own_target, hour), partition_key(hour), postgres=own_target.resource(port=proxy.port)
        )
        assert is_copying.wait(30)
        postgres_server.restart(server, mode)
        assert landed(own_target) == NOTHING
        proxy.thaw()
        assert done.result().error is None
    assert done.result().counts == (ROWS, 0, 0)
    assert landed(own_target) == EACH_ROW_ONCE


def test_a_postgres_that_stays_away_fails_the_run_and_the_next_run_completes_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime, proxy: TcpProxy
) -> None:
    fill(source, hour)
    export, through_proxy = export_of("events", target, hour), target.resource(port=proxy.port)

    def vanish() -> None:
        proxy.refuse()
        proxy.cut()

    proxy.after(MIDDLE, vanish)
    failed = run(export, partition_key(hour), postgres=through_proxy)
    assert failed.error is not None
    assert f"No connection to Postgres at localhost:{proxy.port}" in failed.error
    assert "Is the server running" in failed.error
    assert landed(target) == NOTHING
    proxy.accept()
    assert run(export, partition_key(hour), postgres=through_proxy).counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


def test_a_range_that_loses_its_connection_in_its_second_interval_completes_with_each_intervals_own_counts(
    source: Source, target: Target, run: RunExport, hour: datetime, proxy: TcpProxy
) -> None:
    hours = [hour - 2 * HOUR, hour - HOUR, hour]
    fill(source, *hours)
    seen: list[tuple[int, int, int]] = []

    def strike() -> None:
        seen.append(landed(target))
        proxy.cut()

    proxy.after(INTERVAL + MIDDLE, strike)
    done = run(
        export_of("events", target, hour),
        partition_key(hours[0]),
        partition_key(hour),
        postgres=target.resource(port=proxy.port),
    )
    assert done.error is None
    assert seen == [EACH_ROW_ONCE]
    assert {key: values["rows_inserted"] for key, values in done.metadata.items()} == {
        partition_key(moment): ROWS for moment in hours
    }
    assert landed(target) == (3 * ROWS, 3 * ROWS, 3)


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_a_commit_whose_answer_is_lost_is_no_failure_and_is_not_done_twice(
    source: Source,
    target: Target,
    run: RunExport,
    in_background: InBackground,
    hour: datetime,
    proxy: TcpProxy,
    fault: str,
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    make_tables(run, target, hour)
    with held_in_commit(target) as hold:
        done = in_background(export, partition_key(hour), postgres=target.resource(port=proxy.port, read_timeout=2))
        hold.wait()
        proxy.freeze()
        assert landed(target) == NOTHING
        hold.release()
        eventually(lambda: landed(target) == EACH_ROW_ONCE)
        getattr(proxy, fault)()
        assert done.result().error is None
    assert done.result().counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


@pytest.mark.parametrize(
    ("held", "fault"), [(held_before_commit, "cut"), (held_in_commit, "cut_client"), (held_in_commit, "freeze")]
)
def test_a_connection_that_is_lost_around_commit_leaves_each_row_once(
    source: Source,
    target: Target,
    run: RunExport,
    in_background: InBackground,
    hour: datetime,
    proxy: TcpProxy,
    held: Callable[[Target], AbstractContextManager[Hold]],
    fault: str,
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    make_tables(run, target, hour)
    with held(target) as hold:
        done = in_background(export, partition_key(hour), postgres=target.resource(port=proxy.port, read_timeout=2))
        hold.wait()
        connections = proxy.connections_made
        getattr(proxy, fault)()
        # Until the export has noticed.
        eventually(lambda: proxy.connections_made > connections)
        assert landed(target) == NOTHING
        hold.release()
        assert done.result().error is None
    assert done.result().counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


# The server


def test_a_full_disk_leaves_nothing_and_the_next_run_with_room_completes_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    make_tables(run, target, hour)
    with small_disk(target, megabytes=6) as disk:
        target.execute(f"ALTER TABLE events SET TABLESPACE {disk.tablespace}")
        failed = run(export, partition_key(hour))
        assert failed.error is not None
        assert "No space left on device" in failed.error
        assert landed(target) == NOTHING
        disk.grow(megabytes=64)
        assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
        assert landed(target) == EACH_ROW_ONCE
        target.execute("DROP TABLE events")


@dataclass(frozen=True)
class SmallDisk:
    """A disk in memory with a tablespace on it."""

    folder: Path
    tablespace: str

    def grow(self, megabytes: int) -> None:
        mount("-o", f"remount,size={megabytes}m", str(self.folder))


@contextlib.contextmanager
def small_disk(target: Target, megabytes: int) -> Iterator[SmallDisk]:
    """For as long as the block lasts, at the end of which its tables must be gone."""
    server = target.sandbox.postgres
    owner = server.folder.stat()
    # Not below the server's data: PostgreSQL warns of a tablespace there.
    folder = Path(tempfile.mkdtemp(prefix="pg_exports_disk_", dir="/tmp"))
    disk = SmallDisk(folder, target.schema)
    try:
        mount(
            "-t",
            "tmpfs",
            "-o",
            f"size={megabytes}m,mode=700,uid={owner.st_uid},gid={owner.st_gid}",
            "tmpfs",
            str(folder),
        )
        try:
            server.execute(f"CREATE TABLESPACE {disk.tablespace} LOCATION '{folder}'")
            yield disk
        finally:
            target.execute("DROP TABLE IF EXISTS events")
            server.execute(f"DROP TABLESPACE IF EXISTS {disk.tablespace}")
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def mount(*words: str) -> None:
    """Mount, or skip the test that needs it."""
    mounted = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"A full disk takes the right to mount one: {mounted.stderr.strip()}")


def test_a_standby_as_destination_is_named_and_the_primary_takes_the_same_export(
    source: Source, own_target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    export = export_of("events", own_target, hour)
    primary = own_target.sandbox
    standby = postgres_server.start_standby(primary.postgres, primary.certificates)
    try:
        refused = run(export, partition_key(hour), postgres=own_target.resource(port=standby.port))
    finally:
        postgres_server.stop(standby)
    assert refused.error is not None
    assert "read-only standby" in refused.error
    assert "set `host` (POSTGRES_HOST) to the primary" in refused.error
    assert run(export, partition_key(hour), postgres=own_target.resource()).counts == (ROWS, 0, 0)
    assert landed(own_target) == EACH_ROW_ONCE


def test_a_table_that_another_session_locks_fails_the_run_after_the_lock_timeout_and_the_next_run_completes_it(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    make_tables(run, target, hour)
    monkeypatch.setattr(session, "LOCK_TIMEOUT", 0.3)
    with locked(target):
        failed = run(export, partition_key(hour))
    assert failed.error is not None
    assert "canceling statement due to lock timeout" in failed.error
    assert landed(target) == NOTHING
    assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


def test_a_lock_that_is_given_back_is_waited_for(
    source: Source, target: Target, run: RunExport, in_background: InBackground, hour: datetime
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    make_tables(run, target, hour)
    with locked(target):
        done = in_background(export, partition_key(hour))
        eventually(lambda: target.rows("SELECT FROM pg_locks WHERE relation = 'events'::regclass AND NOT granted"))
    assert done.result().counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


@contextlib.contextmanager
def locked(target: Target) -> Iterator[None]:
    """Another session has the table for itself, as a migration would."""
    with (
        postgres_server.admin(target.sandbox.postgres, DATABASE) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("BEGIN")
        cursor.execute(f"LOCK TABLE {quoted(target.schema)}.events IN ACCESS EXCLUSIVE MODE")
        yield
        cursor.execute("ROLLBACK")
