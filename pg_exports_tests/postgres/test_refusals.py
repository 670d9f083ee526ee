"""Refusals in the words of poolers and providers: passing while connecting unless they are known to last, passing trouble
after login, too; and each with what to do.
"""

import dataclasses
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psycopg2
import pytest

from pg_exports import PostgresResource
from pg_exports.errors import DestinationError, PassingError
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.postgres_server import PostgresServer
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.pgbouncer import pgbouncer
from pg_exports_tests.postgres.refusing_pooler import Refusal, RefusingPooler, refusing_pooler
from pg_exports_tests.source_rows import event, export_of

PASSING = [
    # PgBouncer, whose newer versions give other SQLSTATEs than 08P01.
    Refusal("08P01", "no more connections allowed (max_client_conn)"),
    Refusal("53300", "no more connections allowed (max_client_conn)"),
    Refusal("08P01", "query_wait_timeout"),
    Refusal("08P01", "client_login_timeout"),
    Refusal("08P01", "client_login_timeout (server down)"),
    Refusal("08P01", "server login has been failing, try again later (server_login_retry)"),
    Refusal("08P01", 'server login has been failing, cached error: role "x" does not exist (server_login_retry)'),
    Refusal("08P01", "pgbouncer cannot connect to server"),
    Refusal("08006", "server conn crashed?"),
    Refusal("57P01", "pgbouncer is shutting down"),
    Refusal("08P01", "bouncer config error"),
    # Supavisor
    Refusal("XX000", "Max client connections reached"),
    Refusal(
        "XX000", "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited to pool_size"
    ),
    Refusal(
        "XX000", "(EMAXCONNSESSION) max clients reached in session mode - max clients are limited to pool_size: 15"
    ),
    Refusal("XX000", "(EMAXCONN) max client connections reached, limit: 200"),
    Refusal(
        "XX000", "(ECHECKOUTTIMEOUT) unable to check out connection from the pool after 15000ms in Transaction mode"
    ),
    Refusal("XX000", "Unable to check out process from the pool due to timeout"),
    Refusal("XX000", "(EDBHANDLEREXITED) DbHandler exited. Check logs for more information"),
    Refusal("XX000", "(EDBHANDLEREXITED) connection to database closed. Check logs for more information"),
    Refusal("XX000", "(EAUTHQUERY) authentication query failed: connection to database not available"),
    Refusal("08006", "connection failure during authentication"),
    Refusal("XX000", "(ECIRCUITBREAKER) too many authentication failures, new connections are temporarily blocked"),
    Refusal("58000", ":econnrefused"),
    Refusal("58000", "Authentication error, reason: {:error, :etimedout}"),
    Refusal("XX000", "Failed to subscribe to tenant after multiple retries. Terminating."),
    # RDS Proxy
    Refusal("08000", "Timed-out waiting to acquire database connection."),
    Refusal("53300", "The maximum number of client connections to the proxy exceeded 100."),
    Refusal("08000", "The IAM authentication failed because of too many competing requests."),
    Refusal("08000", "Rate of connection to proxy exceeded 10."),
    # Neon
    Refusal("XX000", "Couldn't connect to compute node"),
    Refusal("XX000", "Control plane request failed"),
    Refusal("XX000", "Control plane request failed: endpoint is temporarily unavailable. Check your quotas."),
    Refusal("53300", "Too many connections attempts"),
    Refusal(
        "XX000",
        "Failed to acquire permit to connect to the database. Too many database connection attempts are ongoing.",
    ),
    # PgCat, Postgres in other languages, and what nobody has seen yet
    Refusal("58000", "could not get connection from the pool - AllServersDown"),
    Refusal("57P03", "das Datenbanksystem startet"),
    Refusal("57P03", "データベースシステムは起動処理中です"),
    Refusal("57P03", "the database system is not accepting connections"),
    Refusal("53300", "zu viele Verbindungen von Rolle »x«"),
    Refusal("XX999", "words of a pooler to come"),
]

LASTING = [
    (Refusal("28P01", "password authentication failed for user 'x'"), "POSTGRES_PASSWORD"),
    (Refusal("08P01", "SASL authentication failed"), "POSTGRES_PASSWORD"),
    (Refusal("28P01", "The password that was provided for the role x is wrong."), "POSTGRES_PASSWORD"),
    (Refusal("28000", "The IAM authentication failed for the role x. Check the IAM token."), "POSTGRES_PASSWORD"),
    (Refusal("28000", 'Cloud SQL IAM user authentication failed for user "x"'), "POSTGRES_PASSWORD"),
    (Refusal("3D000", 'Request returned an error: database "x" does not exist'), "POSTGRES_DATABASE"),
    (Refusal("08P01", "no such database: x"), "POSTGRES_DATABASE"),
    (Refusal("08P01", "no such user"), "POSTGRES_USER"),
    (Refusal("58000", 'No pool configured for database: "x", user: "y"'), "POSTGRES_DATABASE"),
    (Refusal("XX000", "Tenant or user not found"), "project's reference"),
    (Refusal("XX000", "(ENOTFOUND) tenant/user postgres.abc not found"), "project's reference"),
    (Refusal("XX000", "(EADDRNOTALLOWED) address not in tenant allow_list: {1, 2, 3, 4}"), "machine's address"),
    (Refusal("28000", "This IP address 1.2.3.4 is not allowed to connect to this endpoint."), "machine's address"),
    (Refusal("28000", 'no pg_hba.conf entry for host "1.2.3.4", user "x", database "y", SSL encryption'), "hostssl"),
    (Refusal("28000", 'pg_hba.conf rejects connection for host "1.2.3.4", user "x", database "y"'), "hostssl"),
    (Refusal("28000", 'Ident authentication failed for user "x"'), "scram-sha-256"),
    (Refusal("28000", "connection requires a valid client certificate"), "scram-sha-256"),
]


@pytest.fixture
def pooler(sandbox: Sandbox) -> Iterator[RefusingPooler]:
    with refusing_pooler(sandbox) as running:
        yield running


def connect(resource: PostgresResource, logged_in: Callable[[], None] = lambda: None) -> None:
    """Connect and ask something."""
    with resource.session() as session:
        logged_in()
        session.rows("SELECT 1", doing="asking")


# While connecting


@pytest.mark.parametrize("refusal", PASSING, ids=str)
def test_a_login_that_is_refused_for_what_may_pass_is_tried_again(
    target: Target, pooler: RefusingPooler, refusal: Refusal
) -> None:
    pooler.login = refusal
    with pytest.raises(PassingError) as refused:
        connect(target.resource(port=pooler.port))
    assert f"as {ROLE}: " in str(refused.value)
    assert refusal.message in str(refused.value)
    pooler.login = None
    connect(target.resource(port=pooler.port))


@pytest.mark.parametrize(("refusal", "remedy"), LASTING, ids=str)
def test_a_login_that_is_refused_for_what_lasts_fails_at_once_with_what_to_do(
    target: Target, pooler: RefusingPooler, refusal: Refusal, remedy: str
) -> None:
    pooler.login = refusal
    with pytest.raises(DestinationError) as refused:
        connect(target.resource(port=pooler.port))
    assert refusal.message in str(refused.value)
    assert remedy in str(refused.value)


LIMITS = [
    (Refusal("53300", 'too many connections for role "a b"'), 'ALTER ROLE "a b" CONNECTION LIMIT -1;'),
    (Refusal("53300", 'too many connections for database "x"'), 'ALTER DATABASE "x" CONNECTION LIMIT -1;'),
    (Refusal("53300", "sorry, too many clients already"), "max_connections"),
    (Refusal("08P01", "no more connections allowed (max_client_conn)"), "PgBouncer's max_client_conn"),
    (Refusal("08P01", "query_wait_timeout"), "PgBouncer's query_wait_timeout"),
    (Refusal("XX000", "(EMAXCONN) max client connections reached, limit: 200"), "the pooler's pool"),
    (Refusal("08000", "Timed-out waiting to acquire database connection."), "the pooler's pool"),
]


@pytest.mark.parametrize("is_logged_in", [False, True])
@pytest.mark.parametrize(("refusal", "remedy"), LIMITS, ids=str)
def test_a_limit_on_connections_is_tried_again_and_says_what_to_raise(
    target: Target, pooler: RefusingPooler, refusal: Refusal, remedy: str, is_logged_in: bool
) -> None:
    pooler.login = None if is_logged_in else refusal
    with pytest.raises(PassingError) as refused:
        connect(target.resource(port=pooler.port), lambda: setattr(pooler, "statement", refusal))
    assert remedy in str(refused.value)
    assert "`pools` in dagster.yaml" in str(refused.value)


def test_of_two_addresses_one_that_refuses_the_connection_does_not_hide_that_the_other_refuses_the_password(
    sandbox: Sandbox, target: Target
) -> None:
    if len({address for *_, address in socket.getaddrinfo(HOST, 1, type=socket.SOCK_STREAM)}) < 2:
        pytest.skip("localhost has one address here")
    with pgbouncer(sandbox, pool_size=1) as pooler, pytest.raises(DestinationError) as refused:
        connect(target.resource(port=pooler.port, password="wrong"))
    assert "Connection refused" in str(refused.value)
    assert "POSTGRES_PASSWORD" in str(refused.value)


# After login


@pytest.mark.parametrize("is_fatal", [True, False])
@pytest.mark.parametrize("refusal", [one for one in PASSING if one.state != "XX999"], ids=str)
def test_a_statement_that_a_pooler_refuses_for_what_may_pass_is_tried_again(
    target: Target, pooler: RefusingPooler, refusal: Refusal, is_fatal: bool
) -> None:
    with target.resource(port=pooler.port).session() as session:
        pooler.statement = Refusal(refusal.state, refusal.message, is_fatal)
        with pytest.raises(PassingError) as refused:
            session.rows("SELECT 1", doing="asking")
    assert "while asking" in str(refused.value)
    assert refusal.message in str(refused.value)
    assert "SELECT" not in str(refused.value)


@pytest.mark.parametrize(
    "state", ["0A000", "22P02", "23505", "28000", "3D000", "3F000", "42501", "42P01", "54000", "57014"]
)
def test_a_statement_that_is_refused_for_what_it_says_is_not_tried_again(
    target: Target, pooler: RefusingPooler, state: str
) -> None:
    """Whatever its words are: these may hold a value of the user's."""
    with target.resource(port=pooler.port).session() as session:
        pooler.statement = Refusal(state, "too many connections: pgbouncer is shutting down, query_wait_timeout", False)
        with pytest.raises(DestinationError):
            session.rows("SELECT 1", doing="asking")


@pytest.mark.parametrize("when", ["login", "statement"])
def test_a_run_outlives_what_a_pooler_refuses_and_each_row_lands_once(
    source: Source, target: Target, run: RunExport, hour: datetime, pooler: RefusingPooler, when: str
) -> None:
    source.insert("events", event(hour), event(hour))
    export, resource = export_of("events", target, hour), target.resource(port=pooler.port)
    assert run(export, partition_key(hour), postgres=resource).tries == 1
    source.insert("events", event(hour))
    refused = pooler.refused
    if when == "statement":
        pooler.statement = Refusal("XX000", "(EDBHANDLEREXITED) DbHandler exited. Check logs for more information")
        done = run(export, partition_key(hour), postgres=resource)
    else:
        pooler.login = Refusal("XX000", "(EMAXCONNSESSION) max clients reached in session mode")
        failed = run(export, partition_key(hour), postgres=resource)
        assert "EMAXCONNSESSION" in str(failed.error)
        assert failed.tries > 1
        pooler.login = None
        done = run(export, partition_key(hour), postgres=resource)
    assert pooler.refused > refused
    assert (done.error, done.counts) == (None, (1, 0, 2))
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(3, 3)]


# In another language


@pytest.fixture(scope="module", params=["de_DE", "ja_JP"])
def foreign(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with another Postgres, which speaks another language."""
    locale = f"{request.param}.UTF-8"
    # The server's user must be able to read it.
    with (
        tempfile.TemporaryDirectory(prefix="pg_exports_locale_", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path(folder).chmod(0o755)
        compile_it = ["localedef", "-i", request.param, "-f", "UTF-8", f"{folder}/{locale}"]
        if not shutil.which("localedef") or subprocess.run(compile_it, capture_output=True, check=False).returncode:
            pytest.skip(f"The locale {locale} cannot be had here")
        patch.setenv("LOCPATH", folder)
        server = postgres_server.start(sandbox.certificates, settings={"lc_messages": f"'{locale}'"})
        try:
            postgres_server.create_role(server, ROLE, sandbox.password)
            postgres_server.create_database(server, DATABASE)
            postgres_server.grant_export(server, ROLE, DATABASE)
            if server.rows("SHOW lc_messages") != [(locale,)] or "does not exist" in unknown_role(server):
                pytest.skip("This Postgres was built without its translations")
            yield dataclasses.replace(sandbox, postgres=server)
        finally:
            postgres_server.stop(server)


def unknown_role(server: PostgresServer) -> str:
    """What the server says of a role that is not there."""
    with pytest.raises(psycopg2.Error) as refused:
        server.execute("SET ROLE nobody_of_that_name")
    return str(refused.value)


def test_a_server_that_has_no_connection_left_is_tried_again_in_any_language(foreign: Sandbox) -> None:
    server, resource = foreign.postgres, Target(foreign, "public").resource()
    server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    with pytest.raises(PassingError) as limited:
        connect(resource)
    assert "too many" not in str(limited.value)
    server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    connect(resource)


def test_a_row_that_postgres_refuses_is_set_aside_in_any_language(
    source: Source, foreign: Sandbox, run: RunExport, hour: datetime
) -> None:
    target = Target(foreign, "public")
    target.execute(
        "CREATE TABLE events (uuid text, event text CHECK (event <> 'bad'), \"timestamp\" timestamptz, team_id int)",
        f"GRANT INSERT, SELECT ON events TO {ROLE}",
    )
    source.insert("events", event(hour), event(hour, event="bad"), event(hour))
    export = export_of("events", target, hour)
    done = run(export, partition_key(hour), postgres=target.resource())
    assert done.error is None
    assert (done.counts, target.count("pg_exports_rejected")) == ((2, 0, 0), 1)
