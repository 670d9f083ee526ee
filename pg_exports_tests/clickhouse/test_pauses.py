"""An answer whose reader pauses for longer than the server waits is whole all the same, up to a limit of memory."""

import time
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import pytest

from pg_exports import ClickHouseResource
from pg_exports.clickhouse import answer, resource
from pg_exports.errors import PassingError
from pg_exports.models import Query
from pg_exports.sandbox import Sandbox, clickhouse_process
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.clickhouse_process import ClickHouseServer
from pg_exports_tests.clickhouse.test_resource import NUMBERS

SEND_TIMEOUT = 3
"""Seconds after which this server gives an answer up. ClickHouse's default is 30."""

ROWS = 300_000
QUERY = Query(f"SELECT number, hex(randomString(500)) AS word FROM numbers({ROWS})", {})
"""Some 200 MB, compressed: far more than the kernels hold."""


@pytest.fixture(scope="module")
def impatient(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    folder: Path = tmp_path_factory.mktemp("impatient")
    (folder / "users.d").mkdir()
    timeout = f"<http_send_timeout>{SEND_TIMEOUT}</http_send_timeout>"
    (folder / "users.d" / "timeout.xml").write_text(
        f"<clickhouse><profiles><default>{timeout}</default></profiles></clickhouse>"
    )
    server = clickhouse_process.start(
        folder,
        password="secret",
        certificate=sandbox.certificates.certificate,
        key=sandbox.certificates.key,
    )
    yield server
    clickhouse_process.stop(server)


def connection(server: ClickHouseServer, sandbox: Sandbox, *, secure: bool) -> ClickHouseResource:
    return ClickHouseResource(
        host=HOST,
        port=server.https_port if secure else server.http_port,
        secure=secure,
        ca_certificate=str(sandbox.certificates.authority) if secure else None,
        user=server.user,
        password=server.password,
        settings={"max_block_size": 5000},
    )


@pytest.mark.parametrize("secure", [False, True])
def test_an_answer_is_whole_after_a_pause_of_several_times_what_the_server_waits(
    impatient: ClickHouseServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr(answer, "PATIENCE", SEND_TIMEOUT / 3)
    clickhouse = connection(impatient, sandbox, secure=secure)
    with clickhouse.frames(QUERY, NUMBERS, log_comment="tests") as frames:
        numbers = list(next(frames)["number"])
        time.sleep(4 * SEND_TIMEOUT)
        for frame in frames:
            numbers += list(frame["number"])
    assert sorted(numbers) == list(range(ROWS))


def test_an_answer_that_was_given_up_says_for_how_long_it_was_not_read(
    impatient: ClickHouseServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "MOST_AHEAD_BYTES", 0)
    monkeypatch.setattr(resource, "LONG_PAUSE", SEND_TIMEOUT)
    clickhouse = connection(impatient, sandbox, secure=False)
    with clickhouse.frames(QUERY, NUMBERS, log_comment="tests") as frames:
        next(frames)
        time.sleep(4 * SEND_TIMEOUT)
        with pytest.raises(PassingError, match=r"(?s)broke.*Postgres took no rows for \d+ s.*http_send_timeout"):
            list(frames)


def test_bytes_that_were_read_ahead_come_in_their_order_and_in_the_sizes_asked_for(
    impatient: ClickHouseServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "PATIENCE", 0.2)
    monkeypatch.setattr(answer, "AHEAD_BYTES", 1000)
    clickhouse = connection(impatient, sandbox, secure=False)
    query = Query("SELECT number, hex(MD5(toString(number))) AS word FROM numbers(50000)", {})
    with clickhouse.frames(query, NUMBERS, log_comment="tests") as frames:
        rows = []
        for frame in frames:
            rows += frame.rows()
            time.sleep(0.5)
    assert sorted(rows) == [(n, md5(str(n).encode()).hexdigest().upper()) for n in range(50_000)]
