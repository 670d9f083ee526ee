"""Faults between an export and ClickHouse, after rows of the interval have gone to Postgres: nothing of it is seen there,
and the interval is completed by the same run where the fault passes, by the next one where it lasts.
"""

import dataclasses
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from pg_exports import ClickHouseResource
from pg_exports.postgres import ingest
from pg_exports.sandbox import Sandbox, clickhouse_process, source_tables
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.clickhouse.faulty_proxy import End, Spoil, faulty_proxy, first_messages, half_a_message
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, NOTHING, ROWS, eventually, fill, landed, slowly
from pg_exports_tests.source_rows import export_of

FAULTS = [
    pytest.param(first_messages, End.CLEAN, id="ended between two messages"),
    pytest.param(first_messages, End.ABRUPT, id="cut between two messages"),
    pytest.param(half_a_message, End.ABRUPT, id="cut within a message"),
    pytest.param(lambda answer: b"", End.ABRUPT, id="cut before the first row"),
    pytest.param(half_a_message, End.FROZEN, id="frozen"),
]


@pytest.fixture(autouse=True)
def a_copy_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows are in Postgres when the answer breaks."""
    monkeypatch.setattr(ingest, "COPY_BYTES", 500_000)


def through(source: Source, port: int) -> ClickHouseResource:
    """The connection by way of the proxy, which speaks no TLS."""
    return source.resource(port=port, secure=False, read_timeout=1)


@pytest.mark.parametrize(("spoil", "end"), FAULTS)
def test_a_stream_that_breaks_once_is_read_again_by_the_same_run(
    source: Source, target: Target, run: RunExport, hour: datetime, spoil: Spoil, end: End
) -> None:
    fill(source, hour)
    answers = itertools.count()
    seen: list[tuple[int, int, int]] = []

    def spoil_the_first(answer: bytes) -> bytes:
        if next(answers) == 0:
            return spoil(answer)
        seen.append(landed(target))
        return answer

    with faulty_proxy(source.sandbox.clickhouse.http_port, spoil_the_first, end) as port:
        done = run(export_of("events", target, hour), partition_key(hour), clickhouse=through(source, port))
    assert done.error is None
    assert done.counts == (ROWS, 0, 0)
    assert (seen[0], landed(target)) == (NOTHING, EACH_ROW_ONCE)


def test_a_stream_that_breaks_at_every_try_fails_the_run_and_the_next_run_completes_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    with faulty_proxy(source.sandbox.clickhouse.http_port, half_a_message, End.ABRUPT) as port:
        failed = run(export, partition_key(hour), clickhouse=through(source, port))
    assert failed.error is not None
    assert f"ClickHouse at http://localhost:{port} broke off before its end" in failed.error
    assert landed(target) == NOTHING
    assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


@pytest.mark.parametrize(
    "poisoned", [pytest.param("1", id="before the first row"), pytest.param("distinct_id = '4321'", id="in mid-stream")]
)
def test_an_exception_of_clickhouses_is_named_and_the_next_run_completes_the_interval(
    source: Source, target: Target, run: RunExport, hour: datetime, poisoned: str
) -> None:
    fill(source, hour)
    export = export_of("events", target, hour)
    source.execute("RENAME TABLE events TO all_events")
    source.execute(
        f"CREATE VIEW events AS SELECT * REPLACE (if({poisoned}, toString(throwIf({poisoned}, 'the disk is full')),"
        " elements_chain) AS elements_chain) FROM all_events"
    )
    failed = run(export, partition_key(hour))
    assert failed.error is not None
    assert "answered with an error: Code: 395. DB::Exception: the disk is full" in failed.error
    assert landed(target) == NOTHING
    source.execute("DROP VIEW events")
    source.execute("RENAME TABLE all_events TO events")
    assert run(export, partition_key(hour)).counts == (ROWS, 0, 0)
    assert landed(target) == EACH_ROW_ONCE


@pytest.mark.parametrize("secure", [True, False], ids=["TLS", "plain"])
def test_a_server_that_is_killed_in_mid_answer_fails_the_run_and_the_next_one_after_its_restart_completes_the_interval(
    sandbox: Sandbox, target: Target, run: RunExport, hour: datetime, tmp_path: Path, secure: bool
) -> None:
    def start() -> Source:
        server = clickhouse_process.start(
            tmp_path / "clickhouse",
            password=sandbox.clickhouse.password,
            users=[ClickHouseUser(ROLE, sandbox.source_password, export_grants("test_*"))],
            certificate=sandbox.certificates.certificate,
            key=sandbox.certificates.key,
        )
        return Source(dataclasses.replace(sandbox, clickhouse=server), "test_killed")

    source = start()
    wire = {} if secure else {"port": source.sandbox.clickhouse.http_port, "secure": False, "ca_certificate": None}
    try:
        source_tables.create_tables(source.sandbox.execute, source.database)
        fill(source, hour, rows_of_a_part=100)
        export = export_of("events", target, hour)
        with ThreadPoolExecutor(1) as pool:
            slow = source.resource(settings=slowly(200), **wire)
            running = pool.submit(run, export, partition_key(hour), clickhouse=slow)
            reads = "SELECT count() FROM system.processes WHERE query LIKE '%suspect%' AND read_rows > 0 AND user = 'exporter'"
            eventually(lambda: source.rows(reads)[0][0])
            os.kill(source.sandbox.clickhouse.pid, signal.SIGKILL)
            failed = running.result()
        assert failed.error is not None
        assert failed.tries == 6
        assert "does not answer" in failed.error
        assert landed(target) == NOTHING
        clickhouse_process.stop(source.sandbox.clickhouse)
        source = start()
        assert run(export, partition_key(hour), clickhouse=source.resource()).counts == (ROWS, 0, 0)
        assert landed(target) == EACH_ROW_ONCE
    finally:
        clickhouse_process.stop(source.sandbox.clickhouse)
