"""What is read of a server's certificate, whoever signed it and whether or not anybody trusts it."""

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pg_exports.errors import DestinationError, PassingError, SettingsError
from pg_exports.postgres import server_certificate
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports_tests.postgres.hostile_server import hostile_server

DAY = timedelta(days=1)


@pytest.fixture
def listening() -> Iterator[Callable[[bytes], int]]:
    """`listening(answer)`: the port of a server that gives one answer, whatever it is asked."""
    servers: list[socket.socket] = []

    def listen(answer: bytes) -> int:
        server = socket.create_server((HOST, 0))
        servers.append(server)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(8)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    yield listen
    for server in servers:
        server.close()


def test_the_certificate_is_the_one_that_the_server_was_given(sandbox: Sandbox) -> None:
    issued = x509.load_pem_x509_certificate(sandbox.certificates.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(sandbox.certificates.authority.read_bytes())
    shown = server_certificate.read(HOST, sandbox.postgres.port)
    assert shown.protocol == "TLSv1.3"
    assert shown.cipher.startswith("TLS_")
    assert shown.subject == issued.subject.rfc4514_string() != ""
    assert shown.issuer == authority.subject.rfc4514_string() != shown.subject
    assert shown.names == (HOST,)
    assert (shown.begins, shown.expires) == (issued.not_valid_before_utc, issued.not_valid_after_utc)
    assert shown.begins < datetime.now(UTC) < shown.expires


def test_a_name_in_it_steers_no_terminal_and_forges_no_line(tmp_path: Path) -> None:
    name = "x\x1b[2J\nNothing failed."
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - DAY, now + DAY)
    certificate = tmp_path / "server.crt"
    certificate.write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    private = tmp_path / "server.key"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with hostile_server(Certificates(certificate, certificate, private)) as server:
        shown = server_certificate.read(HOST, server.port)
    assert shown.subject == shown.issuer == r"CN=x\x1b[2J\nNothing failed."


def test_it_is_shown_under_a_name_that_is_not_in_it(sandbox: Sandbox) -> None:
    assert server_certificate.read("127.0.0.1", sandbox.postgres.port).names == (HOST,)


def test_a_server_without_tls_is_named() -> None:
    server = postgres_server.start(None)
    try:
        with pytest.raises(DestinationError, match=r"does not support SSL[\s\S]*ssl = on"):
            server_certificate.read(HOST, server.port)
    finally:
        postgres_server.stop(server)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_is_no_postgres_is_named(answer: bytes, listening: Callable[[bytes], int]) -> None:
    with pytest.raises(DestinationError, match=r"does not answer as Postgres does\.\nCheck `host` and `port`"):
        server_certificate.read(HOST, listening(answer))


def test_a_handshake_that_fails_is_named(listening: Callable[[bytes], int]) -> None:
    with pytest.raises(DestinationError, match=r"TLS handshake with Postgres at localhost:\d+ failed"):
        server_certificate.read(HOST, listening(b"Sno TLS at all"))


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_certificate, "TIMEOUT", 0.2)
    with socket.create_server((HOST, 0)) as silent, pytest.raises(PassingError, match="does not answer: timed out"):
        server_certificate.read(HOST, silent.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "port", "error", "setting"),
    [
        (HOST, 1, PassingError, "`host` and `port` (POSTGRES_HOST, POSTGRES_PORT)"),
        (HOST, 65_536, SettingsError, "`port` (POSTGRES_PORT)"),
        ("no-such-host.invalid", 5432, PassingError, "`host` (POSTGRES_HOST)"),
        ("é..🦔", 5432, PassingError, "`host` (POSTGRES_HOST)"),
    ],
    ids=str,
)
def test_where_nothing_answers_the_setting_is_named(host: str, port: int, error: type[Exception], setting: str) -> None:
    with pytest.raises(error) as refused:
        server_certificate.read(host, port)
    assert setting in str(refused.value)
