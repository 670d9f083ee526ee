"""Exports through PgBouncer in transaction mode, where each transaction may come to another of the server's processes."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from pg_exports import PostgresResource
from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, MIDDLE, ROWS, fill, landed
from pg_exports_tests.postgres.pgbouncer import pgbouncer
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy
from pg_exports_tests.postgres.test_io_manager import row_count
from pg_exports_tests.source_rows import event, export_of, mapping, person

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def port(sandbox: Sandbox) -> Iterator[int]:
    """Of a PgBouncer that has two connections to the server."""
    with pgbouncer(sandbox, pool_size=2) as running:
        yield running


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
