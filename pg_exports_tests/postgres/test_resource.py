"""Connections that are set wrongly: one clear error each, and no password in it."""

import time
import traceback
from collections.abc import Callable, Iterator

import dagster as dg
import pytest
from pydantic import ValidationError

from pg_exports import PostgresIOManager, PostgresResource
from pg_exports.errors import DestinationError, PassingError, SettingsError
from pg_exports.postgres.identifiers import literal, quoted
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import Target

ODD_NAME = 'Role "x"; DROP ROLE %s {user} \\ it\'s 🦔'
ODD_PASSWORD = 'it\'s a \\ "pass" {word} %s =é🦔 host=/tmp sslmode=disable'


@pytest.fixture
def connection(sandbox: Sandbox) -> Callable[..., PostgresResource]:
    """The narrow role's connection to the sandbox, with changes."""
    return Target(sandbox, "public").resource


@pytest.fixture
def odd_role(sandbox: Sandbox) -> Iterator[None]:
    """A role whose name and password have every character that a statement or a connection string may trip over."""
    postgres_server.create_role(sandbox.postgres, ODD_NAME, ODD_PASSWORD)
    sandbox.postgres.execute(f"CREATE DATABASE {quoted(ODD_NAME)}")
    yield
    sandbox.postgres.execute(f"DROP DATABASE {quoted(ODD_NAME)}", f"DROP ROLE {quoted(ODD_NAME)}")


def open_and_close(resource: PostgresResource) -> None:
    with resource.session():
        pass


def refusal(resource: PostgresResource) -> str:
    """The message of the one error; neither it nor its traceback shows the password."""
    with pytest.raises((SettingsError, DestinationError, PassingError)) as refused:
        open_and_close(resource)
    shown = "".join(traceback.format_exception(refused.value)) + repr(resource) + str(resource)
    assert not resource.password or resource.password not in shown
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"password": "not-this-one"},
            "Check the connection's `user` and `password` (for `postgres`: POSTGRES_USER, POSTGRES_PASSWORD).",
        ),
        ({"password": ""}, "Set `password` (POSTGRES_PASSWORD)."),
        ({"password": "with a\0NUL"}, "`password` (POSTGRES_PASSWORD) holds a NUL"),
        (
            {"user": "nobody_of_that_name"},
            "Check the connection's `user` and `password` (for `postgres`: POSTGRES_USER, POSTGRES_PASSWORD).",
        ),
        ({"user": ""}, "`user` (POSTGRES_USER) is empty"),
        ({"user": "a\0b"}, "`user` (POSTGRES_USER) holds a NUL"),
        ({"database": "missing"}, "Check `database` (the export's, or POSTGRES_DATABASE)"),
        ({"database": "Exports"}, "Check `database` (the export's, or POSTGRES_DATABASE)"),
        ({"database": ""}, "`database` (POSTGRES_DATABASE) is empty"),
        ({"database": "dagster"}, f'GRANT CONNECT ON DATABASE "dagster" TO "{ROLE}";'),
        ({"port": 1}, "are `host` and `port` (POSTGRES_HOST, POSTGRES_PORT) right?"),
        ({"port": 0}, "Set `port` (POSTGRES_PORT)"),
        ({"port": 65_536}, "Set `port` (POSTGRES_PORT)"),
        ({"host": "no-such-host.invalid"}, "(POSTGRES_HOST)"),
        ({"host": "localhost:5432"}, "(POSTGRES_HOST)"),
        ({"host": "é..🦔"}, "(POSTGRES_HOST)"),
    ],
    ids=str,
)
def test_a_connection_that_is_set_wrongly_names_the_setting(
    changes: dict[str, object], remedy: str, connection: Callable[..., PostgresResource]
) -> None:
    assert remedy in refusal(connection(**changes))


@pytest.mark.parametrize("host", ["/tmp", "@abstract", "", " ", "one,two", "postgresql://u:pass-in-url@localhost/db"])
def test_a_host_that_is_no_host_is_refused_and_never_repeated(
    host: str, connection: Callable[..., PostgresResource]
) -> None:
    message = refusal(connection(host=host))
    assert "`host` (POSTGRES_HOST) must be one host name or address" in message
    assert "pass-in-url" not in message


def test_an_unknown_answer_to_verify_server_identity_names_the_three(
    connection: Callable[..., PostgresResource],
) -> None:
    with pytest.raises(ValidationError, match="'no', 'ca' or 'ca-and-hostname'") as refused:
        connection(verify_server_identity="prefer", password="never-shown")
    assert "never-shown" not in str(refused.value)


def test_a_closed_port_is_tried_again_and_a_wrong_password_is_not(
    connection: Callable[..., PostgresResource],
) -> None:
    for changes, again in (({"port": 1}, True), ({"password": "wrong"}, False)):
        with pytest.raises(dg.Failure) as refused:
            open_and_close(connection(**changes))
        assert refused.value.allow_retries is again


def test_a_role_that_may_not_log_in_is_told_how(sandbox: Sandbox, connection: Callable[..., PostgresResource]) -> None:
    sandbox.postgres.execute("CREATE ROLE grouped NOLOGIN PASSWORD 'secret'")
    try:
        assert 'ALTER ROLE "grouped" LOGIN;' in refusal(connection(user="grouped", password="secret"))
    finally:
        sandbox.postgres.execute("DROP ROLE grouped")


@pytest.mark.usefixtures("odd_role")
def test_any_character_may_stand_in_role_password_and_database(
    sandbox: Sandbox, connection: Callable[..., PostgresResource]
) -> None:
    odd = connection(user=ODD_NAME, password=ODD_PASSWORD, database=ODD_NAME)
    with odd.session() as session:
        [names] = session.rows("SELECT current_user::text, current_database()::text", doing="asking")
    assert names == (ODD_NAME, ODD_NAME)
    denied = refusal(odd.model_copy(update={"database": DATABASE}))
    assert f"GRANT CONNECT ON DATABASE {quoted(DATABASE)} TO {quoted(ODD_NAME)};" in denied
    assert refusal(odd.model_copy(update={"password": ODD_PASSWORD + "!"})).count("password authentication failed") == 1
    assert ODD_PASSWORD not in repr(PostgresIOManager(postgres=odd))


@pytest.mark.parametrize("value", ["{0.password}", "%s", "secret-in-repr"])
def test_no_representation_shows_the_password(value: str, connection: Callable[..., PostgresResource]) -> None:
    resource = connection(password=value, root_certificate="-----BEGIN PRIVATE KEY-----")
    manager = PostgresIOManager(postgres=resource)
    for shown in (repr(resource), str(resource), f"{resource}", repr(manager), str(manager)):
        assert value not in shown
        assert "PRIVATE KEY" not in shown


def test_a_setting_from_the_environment_is_checked_when_the_run_starts(
    connection: Callable[..., PostgresResource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST_OF_THE_TEST", "/tmp")

    @dg.asset
    def connects(postgres: PostgresResource) -> None:
        open_and_close(postgres)

    resource = connection(host=dg.EnvVar("HOST_OF_THE_TEST"))
    result = dg.materialize([connects], resources={"postgres": resource}, raise_on_error=False)
    [failure] = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    assert "`host` (POSTGRES_HOST) must be one host" in str(failure.user_failure_data.description)


def test_a_server_that_has_no_connection_left_is_tried_again(
    sandbox: Sandbox, connection: Callable[..., PostgresResource]
) -> None:
    sandbox.postgres.execute("CREATE ROLE alone LOGIN CONNECTION LIMIT 0 PASSWORD 'secret'")
    try:
        with pytest.raises(PassingError, match="too many connections for role"):
            open_and_close(connection(user="alone", password="secret", database="postgres"))
    finally:
        sandbox.postgres.execute("DROP ROLE alone")


def test_text_arrives_as_it_is_whatever_encoding_the_role_prefers(sandbox: Sandbox, target: Target) -> None:
    sandbox.postgres.execute(f"ALTER ROLE {ROLE} SET client_encoding = 'LATIN1'")
    try:
        with target.resource().session() as session:
            assert session.rows("SELECT $1", "é🦔", doing="asking") == [("é🦔",)]
    finally:
        sandbox.postgres.execute(f"ALTER ROLE {ROLE} RESET client_encoding")


def test_a_connection_ends_with_its_block(target: Target) -> None:
    with target.resource().session() as session:
        [(pid,)] = session.rows("SELECT pg_backend_pid()", doing="asking")
    deadline = time.monotonic() + 5
    while target.rows(f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_database_than_the_connections_own_is_reached_by_name(sandbox: Sandbox, target: Target) -> None:
    with target.resource(database="missing").session(DATABASE) as session:
        assert session.rows(f"SELECT current_database() = {literal(DATABASE)}", doing="asking") == [(True,)]
