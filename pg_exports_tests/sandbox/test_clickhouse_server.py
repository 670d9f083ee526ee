"""The sandbox's ClickHouse, seen from outside: clickhouse-connect and plain HTTP against a process of its own."""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import pytest
import trustme
import urllib3
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

from pg_exports.sandbox.clickhouse_process import ClickHouseServer, ClickHouseStartError, start, stop

ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
AWKWARD_TEXT = 'it\'s a \\ back\\slash,\n\ta "tab" and 😀'


@dataclass(frozen=True)
class Running:
    server: ClickHouseServer
    ca_file: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("clickhouse")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    ca_file, certificate, key = folder / "ca.pem", folder / "certificate.pem", folder / "key.pem"
    authority.cert_pem.write_to_path(ca_file)
    issued.private_key_pem.write_to_path(key)
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    server = start(folder / "server", user="exporter", password="secret", certificate=certificate, key=key)
    yield Running(server, ca_file)
    stop(server)


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Client]:
    with _client(running.server) as client:
        yield client


def _client(server: ClickHouseServer, **options: Any) -> Client:
    chosen: dict[str, Any] = {"port": server.http_port, "username": server.user, "password": server.password, **options}
    return clickhouse_connect.get_client(host="localhost", **chosen)


def _request(server: ClickHouseServer, sql: str, url: str = "/", **headers: str) -> urllib3.BaseHTTPResponse:
    given = {"X-ClickHouse-User": server.user, "X-ClickHouse-Key": server.password}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    address = f"http://127.0.0.1:{server.http_port}{url}"
    return urllib3.request("POST", address, body=sql, headers=given, decode_content=False, preload_content=False)


def test_ping_needs_no_password(running: Running) -> None:
    answer = urllib3.request("GET", f"http://127.0.0.1:{running.server.http_port}/ping")
    assert (answer.status, answer.data) == (200, b"Ok.\n")


def test_a_client_connects_over_https_with_the_sandboxs_own_authority(running: Running) -> None:
    with _client(running.server, port=running.server.https_port, secure=True, ca_cert=str(running.ca_file)) as client:
        assert client.query("SELECT 1, 'a'").result_rows == [(1, "a")]


def test_a_wrong_password_is_refused_with_clickhouses_own_code(running: Running) -> None:
    answer = _request(running.server, "SELECT 1", X_ClickHouse_Key="wrong")
    assert answer.status == 403
    assert answer.headers["X-ClickHouse-Exception-Code"] == "516"
    assert answer.data.startswith(b"Code: 516. DB::Exception: exporter: Authentication failed")
    with pytest.raises(DatabaseError, match="AUTHENTICATION_FAILED"):
        _client(running.server, password="wrong")


@pytest.mark.parametrize(
    ("sql", "status", "code"),
    [
        ("SELECT * FROM no_such_table", 404, "60"),
        ("SELEKT 1", 400, "62"),
        ("SELECT throwIf(number = 3) FROM numbers(5)", 500, "395"),
        ("", 400, "62"),
    ],
)
def test_an_error_before_the_first_byte_has_its_status_and_code(
    running: Running, sql: str, status: int, code: str
) -> None:
    answer = _request(running.server, sql)
    assert (answer.status, answer.headers["X-ClickHouse-Exception-Code"]) == (status, code)
    assert answer.data.startswith(f"Code: {code}. DB::Exception: ".encode())
    assert b"(version 26." in answer.data


def test_parameters_arrive_as_they_were_sent(client: Client) -> None:
    sent = {"text": AWKWARD_TEXT, "list": [AWKWARD_TEXT, "", "plain"], "number": 7}
    rows = client.query("SELECT {text:String}, {list:Array(String)}, {number:UInt8}", parameters=sent).result_rows
    assert rows == [(sent["text"], sent["list"], sent["number"])]


def test_a_query_may_begin_in_the_url_and_go_on_in_the_body(running: Running) -> None:
    assert _request(running.server, "+ 2 AS three", "/?query=SELECT+1&default_format=JSONEachRow").data == (
        b'{"three":3}\n'
    )


def test_a_form_may_hold_the_query_and_its_parameters(running: Running) -> None:
    with _client(running.server, form_encode_query_params=True) as client:
        assert client.query("SELECT {text:String}", parameters={"text": AWKWARD_TEXT}).first_row == (AWKWARD_TEXT,)


def test_settings_and_database_of_a_request_stay_with_it(client: Client, running: Running) -> None:
    client.command("CREATE DATABASE IF NOT EXISTS elsewhere")
    sql = "SELECT getSetting('max_threads'), currentDatabase()"
    with _client(running.server, database="elsewhere", settings={"max_threads": 7}) as other:
        assert other.query(sql).first_row == (7, "elsewhere")
    [(max_threads, database)] = client.query(sql).result_rows
    assert max_threads != 7
    assert database == "default"


def test_a_get_request_cannot_write(running: Running) -> None:
    url = f"http://127.0.0.1:{running.server.http_port}/?user=exporter&password=secret&query="
    assert urllib3.request("GET", url + "SELECT+1").data == b"1\n"
    assert b"(READONLY)" in urllib3.request("GET", url + "CREATE+DATABASE+written").data


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_inserted_rows_come_back(client: Client, running: Running, compress: bool | str) -> None:
    client.command("CREATE OR REPLACE TABLE inserted (id UInt32, text String) ENGINE = MergeTree ORDER BY id")
    rows = [(number, AWKWARD_TEXT * (number % 50)) for number in range(20_000)]
    with _client(running.server, compress=compress) as other:
        other.insert("inserted", rows, column_names=["id", "text"])
        assert other.query("SELECT * FROM inserted ORDER BY id").result_rows == rows
    more = pa.table({"id": pa.array([20_000], pa.uint32()), "text": ["arrow"]})
    client.insert_arrow("inserted", more)
    client.command("INSERT INTO inserted (id, text) VALUES (20001, 'values; FORMAT')")
    client.command('INSERT INTO inserted FORMAT JSONEachRow {"id": 20002, "text": "json"}')
    client.command("INSERT INTO inserted SELECT 20003, 'select'")
    texts = client.query("SELECT text FROM inserted WHERE id >= 20000 ORDER BY id").result_rows
    assert texts == [("arrow",), ("values; FORMAT",), ("json",), ("select",)]


def test_an_insert_from_a_query_into_a_table_with_a_long_name_is_answered_at_once(client: Client) -> None:
    table = "a_table_whose_name_is_as_long_as_names_of_tables_get"
    client.command(f"CREATE TABLE {table} (id UInt64) ENGINE = Memory")
    began = time.monotonic()
    client.command(f"INSERT INTO {table} SELECT 1")
    assert time.monotonic() - began < 10
    assert client.query(f"SELECT id FROM {table}").result_rows == [(1,)]
    client.command(f"DROP TABLE {table}")


def test_an_insert_of_broken_data_is_an_error(client: Client, running: Running) -> None:
    client.command("CREATE OR REPLACE TABLE broken (id UInt32) ENGINE = MergeTree ORDER BY id")
    answer = _request(running.server, "INSERT INTO broken FORMAT JSONEachRow {")
    assert answer.status >= 400
    assert client.command("SELECT count() FROM broken") == 0


@pytest.mark.parametrize("encoding", ["", "lz4", "zstd", "gzip", "br"])
def test_an_arrow_answer_is_one_stream_of_many_batches(running: Running, encoding: str) -> None:
    sql = "SELECT number, toString(number) AS text FROM numbers(300000) FORMAT ArrowStream"
    answer = _request(running.server, sql, "/?enable_http_compression=1", Accept_Encoding=encoding)
    assert answer.headers.get("Content-Encoding", "") == encoding
    data = answer.read()
    if encoding:
        data = pa.CompressedInputStream(pa.BufferReader(data), {"br": "brotli"}.get(encoding, encoding)).read()
    batches = list(pa.ipc.open_stream(data))
    assert len(batches) > 1
    assert pa.Table.from_batches(batches)["number"].to_pylist() == list(range(300_000))
    assert data.endswith(ARROW_END_OF_STREAM)
    assert data.count(ARROW_END_OF_STREAM) == 1


def test_an_arrow_answer_without_rows_still_has_its_schema(client: Client) -> None:
    table = client.query_arrow("SELECT 'a' AS text, 1 AS number WHERE 0")
    assert (table.num_rows, table.column_names) == (0, ["text", "number"])
    with client.query_arrow_stream("SELECT 'a' AS text WHERE 0") as batches:
        assert sum(batch.num_rows for batch in batches) == 0


def test_an_exception_in_mid_stream_breaks_the_connection_off(running: Running) -> None:
    sql = "SELECT number, throwIf(number = 900000) FROM numbers(1000000) FORMAT ArrowStream"
    answer = _request(running.server, sql, "/?max_block_size=10000")
    assert answer.status == 200
    data = bytearray()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        _read_into(data, answer)
    tag = answer.headers["X-ClickHouse-Exception-Tag"]
    block = bytes(data[data.index(b"\r\n__exception__\r\n") :]).decode()
    assert block.startswith(f"\r\n__exception__\r\n{tag}\r\nCode: 395. DB::Exception: ")
    assert block.endswith(f" {tag}\r\n__exception__\r\n")
    assert ARROW_END_OF_STREAM not in data


def _read_into(data: bytearray, answer: urllib3.BaseHTTPResponse) -> None:
    for piece in answer.stream(1 << 16):
        data += piece


def test_clickhouse_connect_names_the_exception_in_mid_stream(client: Client) -> None:
    sql = "SELECT number, throwIf(number = 900000) FROM numbers(1000000)"
    failure = pytest.raises(StreamFailureError, match="FUNCTION_THROW_IF_VALUE_IS_NON_ZERO")
    with failure, client.query_rows_stream(sql) as rows:
        list(rows)


def test_the_query_log_holds_the_comment(client: Client) -> None:
    client.query("SELECT 41 + 1", settings={"log_comment": "from the tests"})
    client.command("SYSTEM FLUSH LOGS")
    sql = "SELECT query FROM system.query_log WHERE type = 'QueryFinish' AND log_comment = 'from the tests'"
    assert any(query.startswith("SELECT 41 + 1") for (query,) in client.query(sql).result_rows)


@needs_proc
def test_clients_that_hang_up_leave_nothing_behind(client: Client, running: Running) -> None:
    sql = "SELECT number, randomString(1000) FROM numbers(1000000) FORMAT ArrowStream"
    descriptors = Path(f"/proc/{running.server.pid}/fd")
    for attempt in range(60):
        if attempt == 10:
            opened_before = len(list(descriptors.iterdir()))
        _request(running.server, sql, "/?max_block_size=1000").close()
    deadline = time.monotonic() + 10
    while client.command("SELECT count() FROM system.processes") != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.command("SELECT count() FROM system.processes") == 1
    assert len(list(descriptors.iterdir())) <= opened_before + 5


@needs_proc
def test_a_slow_client_holds_the_query_and_not_its_rows(running: Running) -> None:
    answer = _request(
        running.server, "SELECT randomString(1000) FROM numbers(10000000) FORMAT ArrowStream", "/?max_block_size=1000"
    )
    answer.read(1 << 20)
    before = _resident_bytes(running.server.pid)
    time.sleep(1)
    assert _resident_bytes(running.server.pid) - before < 100 << 20
    answer.close()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_server_ends_quickly_with_an_open_stream_and_keeps_its_tables(tmp_path: Path) -> None:
    server = start(tmp_path, user="default", password="", certificate=None, key=None)
    with _client(server) as client:
        client.command("CREATE TABLE kept (id UInt8) ENGINE = MergeTree ORDER BY id")
        client.insert("kept", [[1], [2]], column_names=["id"])
    open_stream = _request(server, "SELECT * FROM numbers(1000000000) FORMAT ArrowStream")
    started = time.monotonic()
    stop(server)
    assert time.monotonic() - started < 5
    open_stream.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.http_port)) != 0
    again = start(tmp_path, user="default", password="", certificate=None, key=None)
    with _client(again) as client:
        assert client.command("SELECT count() FROM kept") == 2
        with pytest.raises(ClickHouseStartError, match="has another process opened it"):
            start(tmp_path, user="default", password="", certificate=None, key=None)
    stop(again)
