"""Faults between an export and ClickHouse, after rows of the interval have gone to Postgres: nothing of it is seen there,
and the interval is completed by the same run where the fault passes, by the next one where it lasts.
"""

import itertools
from datetime import datetime

import pytest

from pg_exports import ClickHouseResource
from pg_exports.postgres import ingest
from pg_exports_tests.clickhouse.faulty_proxy import End, Spoil, faulty_proxy, first_messages, half_a_message
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.faults import EACH_ROW_ONCE, NOTHING, ROWS, fill, landed
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
