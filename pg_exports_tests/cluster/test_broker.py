"""The broker's TLS: who talks to it without knowing it for certain is refused, or refuses."""

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("dagster_celery", reason="dagster-celery is not installed: `make cluster`")

import kombu.exceptions
import redis
from dagster_celery.launcher import CeleryRunLauncher

from pg_exports.sandbox import certificates
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports_tests.cluster.deployment import Broker, broker, worker
from pg_exports_tests.faults import eventually
from pg_exports_tests.ui.deployment import PATIENCE, REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server: `make cluster`")

IMPOSTORS = {
    "another authority": "self-signed certificate in certificate chain|unable to get local issuer certificate",
    "another name": "IP address mismatch|Hostname mismatch",
}
"""What is wrong with a broker, and OpenSSL's words for it."""


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with broker(tmp_path_factory.mktemp("broker"), None) as running:
        yield running


@pytest.fixture(params=sorted(IMPOSTORS))
def impostor(queue: Broker, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, str]:
    """The URL of a broker that is not the one that is meant, and what is said of it."""
    another_authority = certificates.issue(tmp_path / "another").authority
    urls = {
        "another authority": queue.url_of(HOST, another_authority),
        "another name": queue.url_of("127.0.0.1", queue.authority),
    }
    return urls[request.param], IMPOSTORS[request.param]


def test_a_worker_takes_nothing_from_a_broker_that_is_not_the_one_that_is_meant(
    impostor: tuple[str, str], tmp_path: Path
) -> None:
    url, said = impostor
    with worker(tmp_path, url) as log:
        eventually(lambda: "Cannot connect to" in log.read_text(), PATIENCE)
        assert re.search(rf"certificate verify failed: .*({said})", log.read_text())
        assert "ready." not in log.read_text()
        assert "Connected to" not in log.read_text()


def test_a_run_is_not_sent_to_it_and_no_result_is_believed(impostor: tuple[str, str]) -> None:
    url, said = impostor
    app = CeleryRunLauncher(default_queue="dagster", broker=url, backend=url).celery
    with app.connection() as connection, pytest.raises(kombu.exceptions.OperationalError, match=said):
        connection.ensure_connection(max_retries=1, interval_start=0)
    with pytest.raises(redis.ConnectionError, match=said):
        app.backend.client.ping()


def test_a_url_that_would_have_nothing_verified_is_refused(queue: Broker) -> None:
    url = queue.url.partition("?")[0]
    app = CeleryRunLauncher(default_queue="dagster", broker=url, backend=url).celery
    with pytest.raises(ValueError, match="must have parameter ssl_cert_reqs"):
        app.backend.client.ping()


def test_plain_text_gets_no_answer(queue: Broker) -> None:
    with socket.create_connection((HOST, queue.port), timeout=30) as plain, contextlib.suppress(ConnectionError):
        plain.sendall(f"AUTH {queue.password}\r\nPING\r\n".encode())
        assert plain.recv(100) == b""
    assert redis.Redis.from_url(queue.url).config_get("port") == {"port": "0"}


def test_the_certificate_that_the_documentation_makes_is_one_that_is_verified(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    [commands] = [block for block in re.findall(r"```sh\n(.+?)```", page, re.DOTALL) if "openssl req" in block]
    script = commands.replace("broker.example.com", HOST)
    subprocess.run(("bash", "-euc", script), cwd=tmp_path, check=True, capture_output=True, timeout=120)
    issued = Certificates(tmp_path / "broker-ca.crt", tmp_path / "broker.crt", tmp_path / "broker.key")
    with broker(tmp_path, None, issued) as running:
        app = CeleryRunLauncher(default_queue="dagster", broker=running.url, backend=running.url).celery
        assert app.backend.client.ping()
        with app.connection() as connection:
            connection.ensure_connection(max_retries=1)
