"""A query and its password go to the host that the connection names, and nowhere else."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pg_exports import ClickHouseResource
from pg_exports.errors import SourceError
from pg_exports.models import Query
from pg_exports.sandbox import Sandbox
from pg_exports_tests.clickhouse.test_resource import plain

ONE = Query("SELECT 1", {})


@contextlib.contextmanager
def host(location: str | None = None, status: int = 200) -> Iterator[tuple[int, list[str]]]:
    """A host that is no ClickHouse: its port, and the requests that it got, headers and all. It may redirect."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(f"{self.requestline}\n{self.headers}")
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_POST()

        def do_CONNECT(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_other_host_hears_nothing(sandbox: Sandbox, status: int) -> None:
    with (
        host() as (other, heard),
        host(f"http://127.0.0.1:{other}/", status) as (port, asked),
    ):
        with pytest.raises(SourceError, match="redirect, which is not followed"):
            plain(sandbox, port=port).rows(ONE, log_comment="")
        assert asked
        assert heard == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_the_environment_names_is_not_used(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with host() as (port, heard):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
            monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{port}")
        clickhouse: ClickHouseResource = plain(sandbox)
        if scheme == "https":
            encrypted = {"port": sandbox.clickhouse.https_port, "secure": True}
            clickhouse = plain(sandbox, **encrypted, ca_certificate=str(sandbox.certificates.authority))
        assert clickhouse.rows(ONE, log_comment="") == [(1,)]
        assert heard == []
