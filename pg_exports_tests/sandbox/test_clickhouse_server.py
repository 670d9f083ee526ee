"""The sandbox's ClickHouse, seen from outside: ClickHouse's own server in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import pytest
import urllib3
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

from pg_exports.sandbox import Sandbox, clickhouse_engine, clickhouse_process
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.clickhouse_process import ClickHouseServer, ClickHouseStartError
from pg_exports.sandbox.servers import ROLE
from pg_exports_tests.clickhouse.users import SOURCE_DATABASES
from pg_exports_tests.conftest import Source

ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def client(sandbox: Sandbox) -> Iterator[Client]:
    with plain_client(sandbox.clickhouse) as client:
        yield client


def plain_client(server: ClickHouseServer, **options: Any) -> Client:
    chosen: dict[str, Any] = {"port": server.http_port, "username": server.user, "password": server.password, **options}
    return clickhouse_connect.get_client(host="localhost", **chosen)


def request(sandbox: Sandbox, sql: str, query: str = "", *, https: bool = False) -> urllib3.BaseHTTPResponse:
    """The unread answer to a query of the administrator's."""
    server = sandbox.clickhouse
    headers = {"X-ClickHouse-User": server.user, "X-ClickHouse-Key": server.password}
    pool = urllib3.PoolManager(ca_certs=str(sandbox.certificates.authority))
    address = f"https://{HOST}:{server.https_port}" if https else f"http://127.0.0.1:{server.http_port}"
    return pool.request(
        "POST", f"{address}/?{query}", body=sql, headers=headers, decode_content=False, preload_content=False
    )


# The engine


def test_the_engine_has_the_private_entry_point_that_makes_it_a_server(tmp_path: Path) -> None:
    # In a process of its own, as an engine ends with its statements.
    program = (
        "import sys; from pathlib import Path; from pg_exports.sandbox import clickhouse_engine;"
        " clickhouse_engine.load()(Path(sys.argv[1]))("
        "\"SYSTEM START LISTEN HTTP; SELECT getServerPort('http_port') > 0, version() INTO OUTFILE 'said' FORMAT TSV\")"
    )
    (tmp_path / "config.xml").write_text(
        "<clickhouse><http_port>0</http_port><listen_host>127.0.0.1</listen_host></clickhouse>"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    listens, version = (tmp_path / "said").read_text().split()
    assert listens == "1"
    assert version.startswith(clickhouse_engine.TESTED_VERSION.rpartition(".")[0])


def test_the_version_that_is_known_to_work_is_the_one_in_the_constraints(repository: Path) -> None:
    constraints = (repository / "deploy" / "constraints.txt").read_text().splitlines()
    assert f"{clickhouse_engine.PACKAGE}=={clickhouse_engine.TESTED_VERSION}" in constraints


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("def other(): ...", "its module _chdb has no function `query`"),
        (None, "its module _chdb was not found"),
    ],
)
def test_another_version_without_the_entry_point_says_which_one_to_install(
    tmp_path: Path, module: str | None, reason: str
) -> None:
    package = tmp_path / "chdb"
    package.mkdir()
    (package / "__init__.py").touch()
    if module:
        # A module in the wheel's place, which Python loads from its source.
        (package / "_chdb_other.so").write_text(module)
    program = (
        "import importlib.util, importlib.machinery, pg_exports.sandbox.clickhouse_engine as engine;"
        " by_file = importlib.util.spec_from_file_location;"
        " importlib.util.spec_from_file_location = lambda name, file: by_file("
        "name, file, loader=importlib.machinery.SourceFileLoader(name, str(file))); engine.load()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert reason in said
    assert said.endswith(f"Install it: pip install 'chdb-core=={clickhouse_engine.TESTED_VERSION}'")


# Start and stop


def test_a_server_stops_at_once_with_connections_open_and_keeps_its_tables(tmp_path: Path) -> None:
    server = clickhouse_process.start(tmp_path / "server", password="first")
    client = plain_client(server)
    client.command("CREATE TABLE kept (id UInt8) ENGINE = MergeTree ORDER BY id")
    client.insert("kept", [[1], [2]], column_names=["id"])
    answer = urllib3.request(
        "POST",
        f"http://127.0.0.1:{server.http_port}/",
        body="SELECT * FROM numbers(100000000000) FORMAT ArrowStream",
        headers={"X-ClickHouse-User": server.user, "X-ClickHouse-Key": server.password},
        preload_content=False,
    )
    answer.read(1000)
    began = time.monotonic()
    clickhouse_process.stop(server)
    assert time.monotonic() - began < 4
    answer.close()
    client.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.http_port)) != 0
    again = clickhouse_process.start(tmp_path / "server", password="second")
    with plain_client(again) as client:
        assert client.command("SELECT count() FROM kept") == 2
    clickhouse_process.stop(again)


def test_a_server_that_was_frozen_goes_on(tmp_path: Path) -> None:
    server = clickhouse_process.start(tmp_path / "server", password="secret")
    try:
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(server.pid, signal.SIGCONT)
        time.sleep(0.5)
        with plain_client(server) as client:
            assert client.command("SELECT 1") == 1
    finally:
        clickhouse_process.stop(server)


def test_several_servers_run_at_once_and_two_on_one_folder_do_not(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda n: clickhouse_process.start(tmp_path / str(n), password="secret"), range(2)))
    try:
        assert len({server.http_port for server in servers}) == 2
        for number, server in enumerate(servers):
            with plain_client(server) as client:
                client.command(f"CREATE TABLE only_here_{number} (id UInt8) ENGINE = Memory")
                assert client.command("SHOW TABLES") == f"only_here_{number}"
        with pytest.raises(ClickHouseStartError, match=r"status 1\.(?s:.*)server\.log:"):
            clickhouse_process.start(servers[0].folder, password="secret")
    finally:
        for server in servers:
            clickhouse_process.stop(server)


# Users


def test_a_wrong_password_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(DatabaseError, match="AUTHENTICATION_FAILED"):
        plain_client(sandbox.clickhouse, password="wrong")


def test_the_user_who_opens_the_ports_can_do_nothing_over_the_network(sandbox: Sandbox) -> None:
    answer = urllib3.request(
        "POST",
        f"http://127.0.0.1:{sandbox.clickhouse.http_port}/?user=default",
        body="SELECT count() FROM system.tables",
    )
    assert b"QUOTA_EXCEEDED" in answer.data


def test_the_exporter_has_the_readmes_grants_and_no_others(sandbox: Sandbox, source: Source, repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    assert "GRANT SELECT, SHOW DICTIONARIES, dictGet ON posthog.* TO exporter;" in readme
    with plain_client(sandbox.clickhouse, username=ROLE, password=sandbox.source_password) as exporter:
        granted = exporter.query("SHOW GRANTS").result_rows
        assert granted == [
            (f"GRANT SHOW DICTIONARIES, SELECT, dictGet ON {databases}.* TO {ROLE}",)
            for databases in sorted(SOURCE_DATABASES)
        ]
        assert exporter.command(f"SELECT count() FROM {source.database}.events") == 0
        for refused in (
            f"INSERT INTO {source.database}.events (team_id) VALUES (1)",
            f"DROP TABLE {source.database}.events",
            "CREATE TABLE default.made (id UInt8) ENGINE = Memory",
            "SELECT * FROM system.dictionaries",
            "SELECT * FROM url('http://localhost/', CSV)",
        ):
            with pytest.raises(DatabaseError, match="ACCESS_DENIED"):
                exporter.command(refused)


def test_what_holds_passwords_can_be_read_by_its_owner_alone(sandbox: Sandbox) -> None:
    folder = sandbox.clickhouse.folder
    with_passwords = [folder / "config.xml", folder / "users.xml", *(folder / "users.d").iterdir()]
    assert all(file.stat().st_mode & 0o077 == 0 for file in with_passwords)
    shown = Path(f"/proc/{sandbox.clickhouse.pid}/cmdline")
    assert not shown.exists() or sandbox.clickhouse.password not in shown.read_text()


# HTTPS, by the relay


def test_a_client_connects_over_https_with_the_sandboxs_own_authority(sandbox: Sandbox) -> None:
    with sandbox.clickhouse_client() as client:
        assert client.query("SELECT 1, 'a'").result_rows == [(1, "a")]


@pytest.mark.parametrize("https", [False, True])
def test_an_arrow_answer_is_one_stream_of_many_batches(sandbox: Sandbox, https: bool) -> None:
    sql = "SELECT number, toString(number) AS text FROM numbers(300000) FORMAT ArrowStream"
    data = request(sandbox, sql, https=https).read()
    batches = list(pa.ipc.open_stream(data))
    assert len(batches) > 1
    assert pa.Table.from_batches(batches)["number"].to_pylist() == list(range(300_000))
    assert data.endswith(ARROW_END_OF_STREAM)


@pytest.mark.parametrize("https", [False, True])
def test_an_exception_in_mid_stream_breaks_the_connection_off(sandbox: Sandbox, https: bool) -> None:
    sql = "SELECT number, throwIf(number = 900000) FROM numbers(1000000) FORMAT ArrowStream"
    answer = request(sandbox, sql, "max_block_size=10000", https=https)
    assert answer.status == 200
    data = bytearray()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        read_into(data, answer)
    assert b"Code: 395. DB::Exception: " in data
    assert not data.endswith(ARROW_END_OF_STREAM)


def read_into(data: bytearray, answer: urllib3.BaseHTTPResponse) -> None:
    for piece in answer.stream(1 << 16):
        data += piece


def test_clickhouse_connect_names_the_exception_in_mid_stream(client: Client) -> None:
    sql = "SELECT number, throwIf(number = 900000) FROM numbers(1000000)"
    failure = pytest.raises(StreamFailureError, match="FUNCTION_THROW_IF_VALUE_IS_NON_ZERO")
    with failure, client.query_rows_stream(sql) as rows:
        list(rows)


def test_a_client_that_hangs_up_ends_its_query(sandbox: Sandbox, client: Client) -> None:
    query_id = uuid.uuid4().hex
    sql = "SELECT number, randomString(1000) FROM numbers(100000000) FORMAT ArrowStream"
    answer = request(sandbox, sql, f"query_id={query_id}&cancel_http_readonly_queries_on_client_close=1", https=True)
    answer.read(1000)
    running = "SELECT count() FROM system.processes WHERE query_id = {query_id:String}"
    assert client.command(running, {"query_id": query_id}) == 1
    answer.close()
    deadline = time.monotonic() + 60
    while client.command(running, {"query_id": query_id}):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_proc
def test_a_slow_client_holds_the_query_and_not_its_rows(sandbox: Sandbox, client: Client) -> None:
    query_id = uuid.uuid4().hex
    sql = "SELECT randomString(1000) FROM numbers(10000000) FORMAT ArrowStream"
    answer = request(sandbox, sql, f"max_block_size=1000&query_id={query_id}", https=True)
    answer.read(1 << 20)
    time.sleep(1)
    used = "SELECT memory_usage, read_rows FROM system.processes WHERE query_id = {query_id:String}"
    [(memory, rows)] = client.query(used, {"query_id": query_id}).result_rows
    assert memory < 100 << 20
    assert rows < 1_000_000
    answer.close()


def test_the_query_log_holds_the_comment(client: Client) -> None:
    comment = uuid.uuid4().hex
    client.query("SELECT 41 + 1", settings={"log_comment": comment})
    client.command("SYSTEM FLUSH LOGS")
    sql = "SELECT query FROM system.query_log WHERE type = 'QueryFinish' AND log_comment = {comment:String}"
    [(query,)] = client.query(sql, {"comment": comment}).result_rows
    assert query.startswith("SELECT 41 + 1")


def test_what_is_written_when_it_is_ready_names_the_process_and_its_ports(sandbox: Sandbox) -> None:
    server = sandbox.clickhouse
    ready = json.loads((server.folder / "ready.json").read_text())
    assert ready == {
        "pid": server.pid,
        "http_port": server.http_port,
        "https_port": server.https_port,
        "tcp_port": server.tcp_port,
    }
