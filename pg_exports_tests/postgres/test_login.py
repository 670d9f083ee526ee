"""What a server hears at a login that has not proved that it may hear it, and how a login of another kind is allowed."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pg_exports import PostgresResource
from pg_exports.errors import DestinationError, PassingError, SettingsError
from pg_exports.postgres import resource, tls
from pg_exports.sandbox import Sandbox, certificates, postgres_server
from pg_exports.sandbox.certificates import Certificates
from pg_exports.sandbox.postgres_server import PostgresServer
from pg_exports.sandbox.servers import DATABASE
from pg_exports_tests.conftest import Target
from pg_exports_tests.postgres.hostile_server import CLEARTEXT, MD5, NOTHING, SCRAM, hostile_server
from pg_exports_tests.postgres.listener import SSL_REQUEST
from pg_exports_tests.postgres.tcp_proxy import tcp_proxy

PASSWORD = "only-for-this-server"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate for the same names that another authority signed."""
    return certificates.issue(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def connection(sandbox: Sandbox) -> Callable[..., PostgresResource]:
    """The narrow role's connection to the sandbox, with changes."""
    return Target(sandbox, "public").resource


def connect(resource: PostgresResource) -> str:
    """Log in, and whom the server says that one is."""
    with resource.session() as session:
        [(role,)] = session.rows("SELECT session_user::text", doing="asking")
        return str(role)


@pytest.mark.parametrize("asks_for", [CLEARTEXT, MD5, NOTHING], ids=["the password", "its md5", "nothing"])
@pytest.mark.parametrize("verify", ["no", "ca", "ca-and-hostname"])
def test_a_server_that_does_not_ask_for_scram_hears_nothing(
    sandbox: Sandbox, connection: Callable[..., PostgresResource], verify: tls.VerifyServerIdentity, asks_for: bytes
) -> None:
    with hostile_server(sandbox.certificates, asks_for) as server:
        with pytest.raises(DestinationError, match="scram-sha-256") as refused:
            connect(connection(port=server.port, verify_server_identity=verify))
        assert "POSTGRES_AUTHENTICATION" in str(refused.value)
        assert len(server.startups) == 1
        # At most the goodbye: `X` and its length.
        assert server.heard in (b"", b"X\0\0\0\4")


def test_who_relays_a_login_with_a_certificate_of_his_own_does_not_get_in(
    sandbox: Sandbox, stranger: Certificates, connection: Callable[..., PostgresResource]
) -> None:
    with hostile_server(stranger, upstream=sandbox.postgres.port) as between:
        with pytest.raises(DestinationError):
            connect(connection(port=between.port, verify_server_identity="no"))
        assert len(between.startups) == 1
        assert sandbox.password.encode() not in between.heard
        assert b"session_user" not in between.heard


@pytest.fixture
def server(sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A server with TLS whose pg_hba.conf has the method that the test asks for."""
    running = postgres_server.start(sandbox.certificates)
    hba = running.folder / "data" / "pg_hba.conf"
    hba.write_text(hba.read_text().replace("scram-sha-256", request.param))
    encryption = "md5" if request.param == "md5" else "scram-sha-256"
    running.execute(f"SET password_encryption = '{encryption}'; CREATE ROLE somebody LOGIN PASSWORD '{PASSWORD}'")
    running.execute("SELECT pg_reload_conf()")
    yield running
    postgres_server.stop(running)


@pytest.mark.parametrize(
    ("server", "authentication"),
    [("md5", "md5"), ("password", "password"), ("trust", "none"), ("scram-sha-256", "scram-sha-256-plus")],
    indirect=["server"],
)
def test_a_server_that_asks_for_something_else_is_logged_in_to_if_a_setting_says_so(
    server: PostgresServer, connection: Callable[..., PostgresResource], authentication: str
) -> None:
    login: dict[str, Any] = {"port": server.port, "user": "somebody", "password": PASSWORD, "database": "postgres"}
    assert connect(connection(**login, authentication=authentication)) == "somebody"
    if authentication != "scram-sha-256-plus":
        with pytest.raises(DestinationError, match="POSTGRES_AUTHENTICATION"):
            connect(connection(**login))


@pytest.mark.parametrize("verify", ["no", "ca"])
def test_the_password_itself_is_sent_to_a_server_alone_that_is_verified(
    connection: Callable[..., PostgresResource], verify: str
) -> None:
    with pytest.raises(SettingsError, match="ca-and-hostname"):
        connect(connection(verify_server_identity=verify, authentication="password"))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"verify_server_identity": "ca", "root_certificate": "system"}, "any public authority"),
        ({"verify_server_identity": "no", "authentication": "md5"}, "act as this user"),
        ({"verify_server_identity": "ca", "authentication": "none"}, "act as this user"),
        ({}, None),
        ({"verify_server_identity": "no"}, None),
    ],
)
def test_the_log_says_what_settings_do_not_protect_from(
    connection: Callable[..., PostgresResource],
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    warning: str | None,
) -> None:
    with pytest.raises(DestinationError), connection(**changes, user="nobody").session(log=logging.getLogger(__name__)):
        pass
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == (warning is not None)
    assert all(str(warning) in text for text in said)


def test_a_server_that_has_the_password_hashed_without_an_end_is_given_up(
    sandbox: Sandbox, connection: Callable[..., PostgresResource], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("CONNECT_TIMEOUT", "HASHING_SECONDS"):
        monkeypatch.setattr(resource, bound, 2)
    with hostile_server(sandbox.certificates, SCRAM, rounds=10_000_000) as server:
        began = time.monotonic()
        with pytest.raises(PassingError, match="does not end: the server has the password hashed"):
            connect(connection(port=server.port, read_timeout=1))
        assert time.monotonic() - began < 8
        assert server.heard


def test_all_that_is_said_to_postgres_is_encrypted_also_where_a_statement_is_given_up(
    sandbox: Sandbox, connection: Callable[..., PostgresResource]
) -> None:
    with tcp_proxy(sandbox.postgres.port) as proxy:
        with connection(port=proxy.port).session() as session:
            threading.Timer(0.5, session.give_up).start()
            with pytest.raises(PassingError):
                session.execute("SELECT pg_sleep(61)", doing="waiting")
        assert proxy.connections_made > 1
        assert set(proxy.first_words) == {SSL_REQUEST}
    assert sandbox.postgres.rows("SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(61)'", DATABASE) == []
