"""Which servers each answer to "Verify server identity?" trusts, and that nothing but the settings decides it."""

import itertools
import json
import logging
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from pg_exports import PostgresResource
from pg_exports.errors import DestinationError, SettingsError
from pg_exports.postgres import tls
from pg_exports.sandbox import Sandbox, certificates, postgres_server
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports.sandbox.postgres_server import PostgresServer
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Target

WRONG_HOST = "127.0.0.1"
OPTIONS: tuple[tls.VerifyServerIdentity, ...] = ("no", "ca", "ca-and-hostname")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that did not sign the sandbox's certificate, and a certificate that it signed."""
    return certificates.issue(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def plain_server() -> Iterator[PostgresServer]:
    """A server without TLS that would let the role in."""
    server = postgres_server.start(None)
    postgres_server.create_role(server, ROLE, "only-for-this-server")
    yield server
    postgres_server.stop(server)


@pytest.fixture
def connection(sandbox: Sandbox) -> Callable[..., PostgresResource]:
    """The narrow role's connection to the sandbox, with changes."""
    return Target(sandbox, "public").resource


def is_encrypted(resource: PostgresResource) -> bool:
    """Connect, and ask Postgres."""
    with resource.session() as session:
        [(encrypted,)] = session.rows("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", doing="asking")
        return bool(encrypted)


@pytest.mark.parametrize(
    ("verify", "root", "host"),
    itertools.product(OPTIONS, ("the right one", "another", "system with it", "system"), (HOST, WRONG_HOST)),
)
def test_a_server_is_trusted_by_its_authority_and_name_as_far_as_the_setting_asks(
    verify: str,
    root: str,
    host: str,
    sandbox: Sandbox,
    stranger: Certificates,
    connection: Callable[..., PostgresResource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if root == "system with it":
        monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.certificates.authority))
    path = {"the right one": str(sandbox.certificates.authority), "another": str(stranger.authority)}
    resource = connection(host=host, verify_server_identity=verify, root_certificate=path.get(root, tls.SYSTEM))
    knows_authority = root in ("the right one", "system with it")
    if verify == "no" or (knows_authority and (verify == "ca" or host == HOST)):
        assert is_encrypted(resource)
        return
    with pytest.raises((DestinationError, SettingsError)) as refused:
        is_encrypted(resource)
    if knows_authority:
        assert "Set `host` (POSTGRES_HOST) to a name in the certificate" in str(refused.value)
        assert "`verify_server_identity` (POSTGRES_VERIFY_SERVER_IDENTITY) to `ca`" in str(refused.value)
    else:
        assert "`root_certificate` (POSTGRES_ROOT_CERTIFICATE)" in str(refused.value)
        assert "authority" in str(refused.value)


def test_no_mode_falls_back_to_plain_text() -> None:
    assert dict(tls.SSL_MODES) == {"no": "require", "ca": "verify-ca", "ca-and-hostname": "verify-full"}


@pytest.mark.parametrize("verify", OPTIONS)
def test_a_server_without_tls_is_refused(
    verify: str, plain_server: PostgresServer, connection: Callable[..., PostgresResource]
) -> None:
    resource = connection(
        port=plain_server.port, database="postgres", password="only-for-this-server", verify_server_identity=verify
    )
    with pytest.raises(DestinationError, match=r"never connects without TLS\. Turn it on in the server") as refused:
        is_encrypted(resource)
    assert "only-for-this-server" not in str(refused.value)
    assert f"{ROLE}@" not in plain_server.log.read_text()


def test_an_expired_certificate_is_refused_unless_identity_is_not_asked(
    tmp_path: Path, connection: Callable[..., PostgresResource]
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert(
        HOST, not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=datetime(2020, 2, 1, tzinfo=UTC)
    )
    files = Certificates(tmp_path / "ca.crt", tmp_path / "server.crt", tmp_path / "server.key")
    authority.cert_pem.write_to_path(str(files.authority))
    issued.cert_chain_pems[0].write_to_path(str(files.certificate))
    issued.private_key_pem.write_to_path(str(files.key))
    server = postgres_server.start(files)
    try:
        postgres_server.create_role(server, ROLE, "secret")
        changes = {"port": server.port, "database": "postgres", "password": "secret"}
        changes |= {"root_certificate": str(files.authority)}
        with pytest.raises(DestinationError, match="has expired"):
            is_encrypted(connection(verify_server_identity="ca", **changes))
        assert is_encrypted(connection(verify_server_identity="no", **changes))
    finally:
        postgres_server.stop(server)


Form = Callable[[str, Certificates, Path], str]


def file(name: str, content: str | bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(folder / name)

    return write


FORMS: dict[str, Form] = {
    "a .crt file": lambda pem, _, folder: file("ca.crt", pem)(folder),
    "a .pem file with Windows line ends and a byte order mark": lambda pem, _, folder: file(
        "ca.pem", b"\xef\xbb\xbf" + pem.replace("\n", "\r\n").encode()
    )(folder),
    "a .pem file that also holds a key": lambda pem, other, folder: file("ca.pem", other.key.read_text() + pem)(folder),
    "a .cer file in DER": lambda pem, _, folder: file("ca.cer", ssl.PEM_cert_to_DER_cert(pem))(folder),
    "a .cer file in PEM": lambda pem, _, folder: file("ca.cer", pem)(folder),
    "a bundle with comments in any language": lambda pem, other, folder: file(
        "authorities.ca-bundle", f"# Főtanúsítvány ✓\n{other.authority.read_text()}\nComment\n{pem}\n{pem}# end"
    )(folder),
    "a name with spaces, quotes and letters beyond ASCII": lambda pem, _, folder: file("it's a ca é%s{x}.crt", pem)(
        folder
    ),
    "PEM text": lambda pem, _, folder: pem,
    "PEM text on one line, as an environment variable may have it": lambda pem, _, folder: pem.replace("\n", "\\n"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_root_certificate_is_read_as(
    form: Form,
    sandbox: Sandbox,
    stranger: Certificates,
    connection: Callable[..., PostgresResource],
    tmp_path: Path,
) -> None:
    pem = sandbox.certificates.authority.read_text()
    assert is_encrypted(connection(root_certificate=form(pem, stranger, tmp_path)))


BAD_FORMS: dict[str, tuple[str, Form]] = {
    "a file that is missing": ("No such file", lambda pem, _, folder: str(folder / "missing.crt")),
    "an empty file": ("is empty", lambda pem, _, folder: file("ca.crt", " \n")(folder)),
    "a folder": ("Is a directory", lambda pem, _, folder: str(folder)),
    "a home that nobody has": ("cannot be read", lambda pem, _, folder: "~nobody-of-that-name/ca.crt"),
    "a path with a NUL": ("cannot be read", lambda pem, _, folder: "/a\0b"),
    "garbage": ("holds no certificate", lambda pem, _, folder: file("ca.cer", b"\x30\x82\xff\x00garbage")(folder)),
    "text that is no PEM": ("holds no certificate", lambda pem, _, folder: file("ca.pem", "hello")(folder)),
    "a bundle of which one certificate is damaged": (
        "certificate number 2",
        lambda pem, other, folder: file("ca.pem", pem + other.authority.read_text().replace("MII", "!!!", 1))(folder),
    ),
    "a private key's file": (
        "a private key is of no use",
        lambda pem, other, folder: file("ca.pem", other.key.read_text())(folder),
    ),
    "a private key's text": ("a private key is of no use", lambda pem, other, folder: other.key.read_text()),
    "a private key's text without its first line": (
        "neither a path nor PEM text",
        lambda pem, other, folder: "".join(other.key.read_text().splitlines()[1:-1]),
    ),
    "nothing": ("is empty", lambda pem, _, folder: ""),
}


@pytest.mark.parametrize(("reason", "form"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_a_root_certificate_is_refused_when_it_is(
    reason: str,
    form: Form,
    sandbox: Sandbox,
    stranger: Certificates,
    connection: Callable[..., PostgresResource],
    tmp_path: Path,
) -> None:
    pem = sandbox.certificates.authority.read_text()
    resource = connection(root_certificate=form(pem, stranger, tmp_path))
    with pytest.raises(SettingsError, match=reason) as refused:
        is_encrypted(resource)
    assert "`root_certificate` (POSTGRES_ROOT_CERTIFICATE)" in str(refused.value)
    for line in stranger.key.read_text().splitlines()[1:-1]:
        assert line not in str(refused.value) + repr(resource)


def test_with_no_the_root_certificate_is_not_read_and_the_log_says_so(
    connection: Callable[..., PostgresResource], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger(__name__)
    with (
        caplog.at_level(logging.INFO),
        connection(verify_server_identity="no", root_certificate="/missing.crt").session(log=log),
        connection(verify_server_identity="no", root_certificate=tls.SYSTEM).session(log=log),
        connection(verify_server_identity="ca").session(log=log),
    ):
        pass
    assert caplog.messages == ["`root_certificate` is ignored: `verify_server_identity` is `no`."]


# Runs in a process of its own, whose home folder and environment are full of libpq's own settings.
ASK = """
import json, os, sys
from pg_exports import PostgresResource
from pg_exports.errors import DestinationError

answers = []
for home, changes in json.load(sys.stdin):
    os.environ["HOME"] = home
    try:
        with PostgresResource(**changes).session() as session:
            answers += session.rows(
                "SELECT current_user::text, current_database()::text, current_setting('client_encoding'),"
                " current_setting('default_transaction_read_only'), ssl, current_setting('DateStyle'),"
                " current_setting('geqo') FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
                doing="asking",
            )
    except DestinationError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_what_lies_in_the_home_folder_and_the_environment_changes_nothing(
    sandbox: Sandbox, stranger: Certificates, connection: Callable[..., PostgresResource], tmp_path: Path
) -> None:
    right, wrong = sandbox.certificates.authority.read_text(), stranger.authority.read_text()
    homes = [home_with(tmp_path / str(n), root, stranger) for n, root in enumerate((right, wrong, "garbage"))]
    trusting: list[dict[str, Any]] = [{"verify_server_identity": verify} for verify in OPTIONS]
    distrusting = [{"verify_server_identity": v, "root_certificate": str(stranger.authority)} for v in OPTIONS[1:]]
    cases = [(str(home), changes) for home in homes for changes in [*trusting, *distrusting]]
    answers = json.loads(
        subprocess.run(
            [sys.executable, "-c", ASK],
            input=json.dumps([(home, settings_of(connection(**changes))) for home, changes in cases]),
            env={**os.environ, **stray_variables(stranger)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert len(answers) == len(cases)
    for (_, changes), answer in zip(cases, answers, strict=True):
        if changes in trusting:
            assert answer == [ROLE, DATABASE, "UTF8", "off", True, "ISO, MDY", "on"]
        else:
            assert "certificate verify failed" in answer


def settings_of(resource: PostgresResource) -> dict[str, Any]:
    names = ("host", "port", "user", "password", "database", "verify_server_identity", "root_certificate")
    return {name: getattr(resource, name) for name in names}


SERVICE = """
[stray]
hostaddr=192.0.2.1
sslmode=disable
sslrootcert=/missing
require_auth=none
replication=database
"""


def home_with(folder: Path, root: str, stranger: Certificates) -> Path:
    postgresql = folder / ".postgresql"
    postgresql.mkdir(parents=True)
    (postgresql / "root.crt").write_text(root)
    (postgresql / "root.crl").write_text("garbage")
    (postgresql / "postgresql.crt").write_text(stranger.certificate.read_text())
    (postgresql / "postgresql.key").write_text("garbage")
    (folder / ".pgpass").write_text("*:*:*:*:wrong")
    (folder / ".pg_service.conf").write_text(SERVICE)
    return folder


def stray_variables(stranger: Certificates) -> dict[str, str]:
    return {
        "PGAPPNAME": "stray",
        "PGCHANNELBINDING": "disable",
        "PGCLIENTENCODING": "LATIN1",
        "PGCONNECT_TIMEOUT": "1",
        "PGDATABASE": "postgres",
        "PGDATESTYLE": "SQL, DMY",
        "PGGEQO": "off",
        "PGGSSDELEGATION": "1",
        "PGGSSENCMODE": "require",
        "PGHOST": "/tmp",
        "PGHOSTADDR": "192.0.2.1",
        "PGLOADBALANCEHOSTS": "random",
        "PGMAXPROTOCOLVERSION": "latest",
        "PGMINPROTOCOLVERSION": "3.2",
        "PGOPTIONS": "-c default_transaction_read_only=on",
        "PGPASSFILE": "/etc/passwd",
        "PGPASSWORD": "stray",
        "PGPORT": "1",
        "PGREQUIREAUTH": "none",
        "PGREQUIREPEER": "nobody",
        "PGREQUIRESSL": "0",
        "PGSERVICE": "stray",
        "PGSSLCERT": str(stranger.certificate),
        "PGSSLCERTMODE": "require",
        "PGSSLCRL": "/etc/passwd",
        "PGSSLCRLDIR": "/etc",
        "PGSSLKEY": "/missing",
        "PGSSLMAXPROTOCOLVERSION": "TLSv1",
        "PGSSLMINPROTOCOLVERSION": "TLSv1.3",
        "PGSSLMODE": "disable",
        "PGSSLNEGOTIATION": "direct",
        "PGSSLROOTCERT": str(stranger.authority),
        "PGSSLSNI": "0",
        "PGTARGETSESSIONATTRS": "read-only",
        "PGTZ": "Asia/Tokyo",
        "PGUSER": "postgres",
    }
