"""The check of a set-up: each step's line where it is right, and what to do where it is not. It writes nothing.

The job is run as Dagster runs it, the command as a process in a project's folder.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import trustme
from cryptography import x509

from pg_exports import ClickHouseResource, PostgresIOManager, PostgresResource, connection_check
from pg_exports import check as check_command
from pg_exports.connection_check import CONNECTION_CHECK, EXPORT, REASON, STEPS, Setup, Status, Step
from pg_exports.models import MODELS, Selection
from pg_exports.postgres.table import Destination
from pg_exports.sandbox import Sandbox, certificates, postgres_server
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports.sandbox.postgres_server import PostgresServer
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import export_of

NAMES = [
    "ClickHouse",
    "Source tables",
    "Postgres, TLS",
    "Postgres, login",
    "Schema",
    "Table",
    "Ledger",
    "Disk",
]
PASSWORD = "only-for-this-server"


def setup_of(model: str, schema: str) -> Setup:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return Setup(model, MODELS[model], Selection(TEAM, moment, moment), Destination(None, schema, model))


@pytest.fixture
def check(source: Source, target: Target) -> Callable[..., list[Step]]:
    """`check(model, clickhouse={}, postgres={})`: the steps of the test's own set-up, with changes. None shows a secret."""

    def steps(
        model: str = "events",
        *,
        clickhouse: Mapping[str, Any] | None = None,
        postgres: Mapping[str, Any] | None = None,
        schema: str = target.schema,
    ) -> list[Step]:
        at_source, destination = source.resource(**clickhouse or {}), target.resource(**postgres or {})
        found = list(connection_check.steps(setup_of(model, schema), at_source, destination))
        for secret in (at_source.password, destination.password, target.sandbox.password):
            assert not any(secret in step.text for step in found)
        return found

    return steps


Check = Callable[..., list[Step]]


def failing(steps: list[Step]) -> tuple[Step, list[str]]:
    """The one step that failed, and those that were not reached because of it."""
    [failed] = [step for step in steps if step.status == "failed"]
    return failed, [step.name for step in steps if step.status == "not reached"]


def saying(steps: list[Step], status: Status, name: str) -> str:
    """The text of the one line of a step with a status."""
    [text] = [step.text for step in steps if (step.status, step.name) == (status, name)]
    return text


def relations(target: Target) -> list[tuple[Any, ...]]:
    return target.rows("SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace ORDER BY 1")


# A set-up that is right


@pytest.mark.parametrize("model", MODELS)
def test_a_set_up_that_is_right_passes_each_step_and_nothing_is_written(
    model: str, check: Check, source: Source, target: Target
) -> None:
    tables = source.rows("SHOW TABLES")
    steps = check(model)
    assert list(dict.fromkeys(step.name for step in steps)) == NAMES
    assert {step.status for step in steps} <= {"passed", "note"}
    [(version,)] = source.rows("SELECT version()")
    server, user = source.resource().address, ROLE
    said = f"ClickHouse {version} at {server}, database {source.database}, as {user}. Encrypted, the certificate is verified."
    assert saying(steps, "passed", "ClickHouse") == said
    assert model in saying(steps, "passed", "Source tables")
    [(postgres,)] = target.rows("SELECT current_setting('server_version')")
    assert f"PostgreSQL {postgres}, database {DATABASE}, as {ROLE}." in saying(steps, "passed", "Postgres, login")
    assert f'"{target.schema}"."{model}" is not there yet' in saying(steps, "passed", "Table")
    assert [step.text.split(" is not there yet")[0] for step in steps if step.name == "Ledger"] == [
        f'"{target.schema}"."pg_exports_{name}"' for name in ("ledger", "keys", "rejected", "tables")
    ]
    assert "a client cannot see" in saying(steps, "note", "Disk")
    assert relations(target) == []
    assert source.rows("SHOW TABLES") == tables


def test_the_certificate_is_shown_as_it_was_issued(check: Check, sandbox: Sandbox) -> None:
    issued = x509.load_pem_x509_certificate(sandbox.certificates.certificate.read_bytes())
    text = saying(check(), "passed", "Postgres, TLS")
    assert f"localhost:{sandbox.postgres.port} speaks TLSv1.3 (TLS_" in text
    assert f"Certificate of {issued.subject.rfc4514_string()} for {HOST}," in text
    assert (
        f"issued by {issued.issuer.rfc4514_string()}, valid until {issued.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        in text
    )


def test_after_a_run_the_tables_are_there(check: Check, run: RunExport, target: Target, hour: datetime) -> None:
    assert run(export_of("persons", target, hour), partition_key(hour)).error is None
    before = relations(target)
    steps = check("persons")
    assert "can hold persons: 7 of the 8 columns" in saying(steps, "passed", "Table")
    assert "by (team_id, distinct_id)" in saying(steps, "passed", "Table")
    assert f'ALTER TABLE "{target.schema}"."persons" ADD COLUMN "is_deleted" BOOLEAN;' in saying(steps, "note", "Table")
    assert [step.text.partition(" is there")[2] for step in steps if step.name == "Ledger"] == [
        ", and the role may write it."
    ] * 4
    assert {step.status for step in steps} == {"passed", "note"}
    assert relations(target) == before


# ClickHouse


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"port": 1}, "Is it running, and are `host`, `port` and `secure`"),
        ({"password": "not-this-one"}, "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD)."),
        ({"database": "missing"}, "(CLICKHOUSE_DATABASE)"),
        ({"ca_certificate": None}, "`ca_certificate` (CLICKHOUSE_CA_CERTIFICATE)"),
        ({"host": "http://someone:a-secret@localhost"}, "`host` (CLICKHOUSE_HOST) must be one host name"),
    ],
    ids=str,
)
def test_a_clickhouse_that_cannot_be_asked_says_why_and_the_other_side_is_looked_at_all_the_same(
    changes: dict[str, object], remedy: str, check: Check
) -> None:
    steps = check(clickhouse=changes)
    failed, not_reached = failing(steps)
    assert (failed.name, not_reached) == ("ClickHouse", ["Source tables"])
    assert remedy in failed.text
    assert "a-secret" not in failed.text
    assert "passed" in {step.status for step in steps if step.name == "Ledger"}


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (
            "DROP TABLE events SYNC",
            "A source table is missing: check the connection's `database` (CLICKHOUSE_DATABASE).",
        ),
        ("ALTER TABLE events DROP COLUMN elements_chain", "A column is missing"),
    ],
    ids=str,
)
def test_what_is_missing_at_the_source_is_named(change: str, remedy: str, check: Check, source: Source) -> None:
    source.execute(change)
    failed, not_reached = failing(check())
    assert (failed.name, not_reached) == ("Source tables", [])
    assert remedy in failed.text


def test_a_clickhouse_without_the_dictionary_gets_a_note(check: Check, source: Source) -> None:
    assert [step.status for step in check("sessions") if step.name == "Source tables"] == ["passed"]
    source.execute("DROP DICTIONARY channel_definition_dict")
    steps = check("sessions")
    assert "channel_definition_dict" in saying(steps, "note", "Source tables")
    assert not [step for step in steps if step.status == "failed"]


def test_a_clickhouse_without_tls_gets_a_warning(check: Check, sandbox: Sandbox) -> None:
    plain = {"port": sandbox.clickhouse.http_port, "secure": False, "ca_certificate": None}
    assert "Not encrypted" in saying(check(clickhouse=plain), "warning", "ClickHouse")


def test_the_source_is_not_read(check: Check, source: Source, sample: Source) -> None:
    for model in MODELS:
        check(model, clickhouse={"database": sample.database})
    source.execute("SYSTEM FLUSH LOGS")
    [(asked, rows)] = source.rows(
        "SELECT count(), sum(read_rows) FROM system.query_log WHERE type = 'QueryFinish' AND has(databases, {database:String})"
        " AND JSONExtractString(log_comment, 'reason') = {reason:String} AND query LIKE '%LIMIT 0%'",
        {"database": sample.database, "reason": CONNECTION_CHECK},
    )
    assert (asked, rows) == (len(MODELS), 0)


# Postgres, TLS and login


@pytest.fixture(scope="module")
def plain_server() -> Iterator[PostgresServer]:
    """A server without TLS."""
    server = postgres_server.start(None)
    yield server
    postgres_server.stop(server)


@pytest.mark.parametrize(
    ("changes", "step", "remedy"),
    [
        ({"port": 1}, "Postgres, TLS", "(POSTGRES_HOST, POSTGRES_PORT)"),
        (
            {"host": "postgres://someone:a-secret@localhost/"},
            "Postgres, TLS",
            "`host` (POSTGRES_HOST) must be one host",
        ),
        ({"user": ""}, "Postgres, TLS", "`user` (POSTGRES_USER) is empty"),
        ({"root_certificate": "system"}, "Postgres, login", "`root_certificate` (POSTGRES_ROOT_CERTIFICATE)"),
        ({"root_certificate": "/missing.crt"}, "Postgres, login", "`root_certificate` (POSTGRES_ROOT_CERTIFICATE)"),
        ({"host": "127.0.0.1"}, "Postgres, login", "Set `host` (POSTGRES_HOST) to a name in the certificate"),
        ({"password": "not-this-one"}, "Postgres, login", "Check the connection's `user` and `password`"),
        ({"database": "missing"}, "Postgres, login", "Check `database` (the export's, or POSTGRES_DATABASE)"),
        ({"database": "dagster"}, "Postgres, login", 'GRANT CONNECT ON DATABASE "dagster" TO "exporter";'),
    ],
    ids=str,
)
def test_a_postgres_that_cannot_be_used_says_why(
    changes: dict[str, object], step: str, remedy: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    failed, not_reached = failing(check(postgres=changes))
    assert failed.name == step
    assert not_reached == NAMES[NAMES.index(step) + 1 :]
    assert remedy in failed.text
    assert "a-secret" not in failed.text


def test_a_certificate_of_another_authority_is_shown_and_not_trusted(check: Check, tmp_path: Path) -> None:
    stranger = certificates.issue(tmp_path)
    steps = check(postgres={"root_certificate": str(stranger.authority)})
    assert ",O=pg_exports sandbox, valid until" in saying(steps, "passed", "Postgres, TLS")
    failed, _ = failing(steps)
    assert failed.name == "Postgres, login"
    assert "is not signed by the authority in `root_certificate`" in failed.text


def test_a_postgres_without_tls_is_refused(check: Check, plain_server: PostgresServer) -> None:
    failed, not_reached = failing(check(postgres={"port": plain_server.port}))
    assert (failed.name, not_reached[0]) == ("Postgres, TLS", "Postgres, login")
    assert "ssl = on" in failed.text


@contextlib.contextmanager
def server_with_a_certificate(folder: Path, begins: datetime, expires: datetime) -> Iterator[dict[str, object]]:
    """A server with a certificate that is valid then. Gives what the connection to it differs by."""
    files = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority = trustme.CA()
    issued = authority.issue_cert(HOST, not_before=begins, not_after=expires)
    authority.cert_pem.write_to_path(str(files.authority))
    issued.cert_chain_pems[0].write_to_path(str(files.certificate))
    issued.private_key_pem.write_to_path(str(files.key))
    server = postgres_server.start(files)
    try:
        postgres_server.create_role(server, ROLE, PASSWORD)
        postgres_server.grant_export(server, ROLE, "postgres")
        yield {
            "port": server.port,
            "database": "postgres",
            "password": PASSWORD,
            "root_certificate": str(files.authority),
        }
    finally:
        postgres_server.stop(server)


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("begins", "ends", "what_is_wrong"),
    [(-2000 * DAY, -9.5 * DAY, "has expired: renew it on the server"), (9.5 * DAY, 99 * DAY, "this machine's clock")],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_out_of_its_time_fails_where_identity_is_verified(
    begins: timedelta, ends: timedelta, what_is_wrong: str, check: Check, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    with server_with_a_certificate(tmp_path, now + begins, now + ends) as connection:
        steps = check(postgres=connection, schema="public")
        unverified = check(postgres={**connection, "verify_server_identity": "no"}, schema="public")
    failed, not_reached = failing(steps)
    assert (failed.name, not_reached[0]) == ("Postgres, TLS", "Postgres, login")
    assert f"valid until {now + ends:%Y-%m-%d %H:%M} UTC" in failed.text
    assert what_is_wrong in failed.text
    assert what_is_wrong in saying(unverified, "warning", "Postgres, TLS")
    assert "not verified" in saying(unverified, "passed", "Postgres, login")


def test_a_certificate_that_expires_soon_is_a_warning(check: Check, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    with server_with_a_certificate(tmp_path, now - 300 * DAY, now + 9.5 * DAY) as connection:
        steps = check(postgres=connection, schema="public")
    assert "expires in 9 days: renew it on the server" in saying(steps, "warning", "Postgres, TLS")
    assert "passed" in {step.status for step in steps if step.name == "Ledger"}


def test_a_read_only_standby_is_named(check: Check, sandbox: Sandbox) -> None:
    standby = postgres_server.start_standby(sandbox.postgres, sandbox.certificates)
    try:
        failed, not_reached = failing(check(postgres={"port": standby.port}))
    finally:
        postgres_server.stop(standby)
    assert (failed.name, not_reached[0]) == ("Postgres, login", "Schema")
    assert "set `host` (POSTGRES_HOST) to the primary" in failed.text


@pytest.fixture
def superuser(sandbox: Sandbox) -> Iterator[str]:
    """A superuser with `PASSWORD`."""
    role = "almighty"
    postgres_server.create_role(sandbox.postgres, role, PASSWORD)
    sandbox.postgres.execute(f"ALTER ROLE {role} SUPERUSER")
    yield role
    sandbox.postgres.execute(f"DROP ROLE {role}")


def test_a_superuser_is_warned_of_and_sees_how_much_room_is_left(check: Check, superuser: str) -> None:
    steps = check(postgres={"user": superuser, "password": PASSWORD})
    assert f"{superuser} is a superuser. An export needs none" in saying(steps, "warning", "Postgres, login")
    assert "GB are free where the server keeps its data" in saying(steps, "note", "Disk")
    assert not [step for step in steps if step.status == "failed"]


# Postgres, schema and tables


def test_a_missing_schema_is_named(check: Check) -> None:
    failed, not_reached = failing(check(schema="missing"))
    assert (failed.name, not_reached) == ("Schema", ["Table", "Ledger"])
    assert f'CREATE SCHEMA "missing"; GRANT USAGE, CREATE ON SCHEMA "missing" TO "{ROLE}";' in failed.text


@pytest.mark.parametrize("privilege", ["USAGE", "CREATE"])
def test_a_grant_on_the_schema_that_is_missing_is_given(privilege: str, check: Check, target: Target) -> None:
    target.execute(f'REVOKE {privilege} ON SCHEMA "{target.schema}" FROM {ROLE}')
    failed, not_reached = failing(check())
    assert (failed.name, not_reached) == ("Schema", ["Table", "Ledger"])
    assert f'GRANT USAGE, CREATE ON SCHEMA "{target.schema}" TO "{ROLE}";' in failed.text


EVENTS = "CREATE TABLE events (uuid text, event text, distinct_id text, timestamp timestamptz, team_id int)"
PERSONS = (
    "CREATE TABLE persons (team_id int, distinct_id text, person_id text, properties jsonb, "
    "person_distinct_id_version bigint, person_version bigint, created_at timestamptz, is_deleted boolean)"
)
GRANT = f"GRANT INSERT, SELECT, UPDATE ON ALL TABLES IN SCHEMA {{schema}} TO {ROLE}"


@pytest.mark.parametrize(
    ("model", "statements", "remedy"),
    [
        (
            "events",
            [EVENTS],
            "lacks INSERT, SELECT on {table}. Run as its owner: GRANT INSERT, SELECT, UPDATE ON {table} TO",
        ),
        (
            "events",
            [EVENTS, "ALTER TABLE events ALTER timestamp TYPE date", GRANT],
            "Column timestamp of {table} is date, which cannot hold the export's TIMESTAMP WITH TIME ZONE",
        ),
        (
            "events",
            [EVENTS, "ALTER TABLE events DROP uuid", GRANT],
            'lacks uuid, which events cannot do without. Run as its owner: ALTER TABLE {table} ADD COLUMN "uuid"',
        ),
        ("persons", [PERSONS, GRANT], 'ALTER TABLE {table} ADD PRIMARY KEY ("team_id", "distinct_id");'),
        ("events", ["CREATE VIEW events AS SELECT 1 AS uuid"], "is no table"),
        (
            "events",
            [EVENTS, "ALTER TABLE events SET UNLOGGED", GRANT],
            "is UNLOGGED: a crash of the server empties it, and its intervals would still count as loaded. Run as its owner",
        ),
        (
            "events",
            [EVENTS, "ALTER TABLE events ENABLE ROW LEVEL SECURITY", GRANT],
            f"Row-level security of {{table}} applies to the role {ROLE}: rows that are there would be hidden",
        ),
        (
            "events",
            [EVENTS, "ALTER TABLE events ALTER distinct_id TYPE char(40)", GRANT],
            'Run as its owner: ALTER TABLE {table} ALTER COLUMN "distinct_id" TYPE TEXT;',
        ),
    ],
    ids=["no grant", "wrong type", "no uuid", "no primary key", "a view", "unlogged", "policies", "a blurred key"],
)
def test_a_table_that_does_not_fit_says_what_to_do(
    model: str, statements: list[str], remedy: str, check: Check, target: Target
) -> None:
    target.execute(*(statement.format(schema=f'"{target.schema}"') for statement in statements))
    failed, not_reached = failing(check(model))
    assert (failed.name, not_reached) == ("Table", [])
    assert remedy.format(table=f'"{target.schema}"."{model}"') in failed.text


def test_columns_that_the_table_lacks_are_a_warning_with_the_statement(check: Check, target: Target) -> None:
    target.execute(EVENTS, GRANT.format(schema=f'"{target.schema}"'))
    steps = check()
    table = f'"{target.schema}"."events"'
    lacking = saying(steps, "warning", "Table")
    assert f"{table} lacks properties, elements, set" in lacking
    assert f'ALTER TABLE {table} ADD COLUMN "properties" JSONB;' in lacking
    assert "person_id" not in lacking
    assert f'ALTER TABLE {table} ADD COLUMN "person_id" TEXT;' in saying(steps, "note", "Table")


def test_a_table_that_cannot_be_asked_for_keys_is_a_warning(check: Check, target: Target) -> None:
    target.execute(EVENTS, "ALTER TABLE events DROP distinct_id", GRANT.format(schema=f'"{target.schema}"'))
    warnings = [step.text for step in check() if step.status == "warning"]
    assert any(
        "has no distinct_id, and events that differ in nothing else would pass for one" in text for text in warnings
    )
    assert not any('ADD COLUMN "distinct_id"' in text for text in warnings)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ("OWNER TO CURRENT_USER", "GRANT INSERT, SELECT, UPDATE ON {table}"),
        ("FORCE ROW LEVEL SECURITY", "ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY;"),
        ("SET UNLOGGED", "ALTER TABLE {table} SET LOGGED;"),
    ],
)
def test_a_table_of_pg_exports_that_does_not_fit_says_what_to_do(
    change: str, remedy: str, check: Check, run: RunExport, target: Target, hour: datetime
) -> None:
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    target.execute("ALTER TABLE pg_exports_keys ENABLE ROW LEVEL SECURITY", f"ALTER TABLE pg_exports_keys {change}")
    failed, not_reached = failing(check())
    assert (failed.name, not_reached) == ("Ledger", [])
    assert remedy.format(table=f'"{target.schema}"."pg_exports_keys"') in failed.text


def test_privileges_that_are_not_needed_are_a_warning_unless_the_role_owns_the_table(
    check: Check, run: RunExport, target: Target, hour: datetime
) -> None:
    assert run(export_of("persons", target, hour), partition_key(hour)).error is None
    assert not [step for step in check("persons") if step.status == "warning"]
    table = f'"{target.schema}"."persons"'
    target.execute("ALTER TABLE persons OWNER TO CURRENT_USER", f"GRANT ALL ON persons TO {ROLE}")
    warning = saying(check("persons"), "warning", "Table")
    assert f'REVOKE DELETE, TRUNCATE ON {table} FROM "{ROLE}";' in warning


def test_a_table_of_a_stranger_is_a_warning_that_names_him_in_the_check_and_in_the_log_of_each_run(
    check: Check, source: Source, target: Target, run: RunExport, hour: datetime, neighbour: str
) -> None:
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    assert not [step for step in check() if step.status == "warning"]
    target.execute(f"ALTER TABLE events OWNER TO {neighbour}", f"GRANT SELECT, INSERT, UPDATE ON events TO {ROLE}")
    said = f'"{target.schema}"."events" belongs to {neighbour}, who is neither'
    assert said in saying(check(), "warning", "Table")
    done = run(export_of("events", target, hour), partition_key(hour))
    assert any(said in line for line in done.log)


def test_who_may_make_triggers_and_whose_triggers_there_are_is_a_warning(
    check: Check, target: Target, run: RunExport, hour: datetime, neighbour: str
) -> None:
    table = f'"{target.schema}"."events"'
    assert run(export_of("events", target, hour), partition_key(hour)).error is None
    target.execute(f"GRANT TRIGGER ON events TO {neighbour}")
    assert f"REVOKE TRIGGER ON {table} FROM {neighbour};" in saying(check(), "warning", "Table")
    target.execute(
        "CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN new; END $$",
        f"ALTER FUNCTION watch() OWNER TO {neighbour}",
        "CREATE TRIGGER watch AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION watch()",
        f"REVOKE TRIGGER ON events FROM {neighbour}",
    )
    said = f'The trigger "watch" on {table} calls a function of {neighbour}, who is neither'
    assert any(step.text.startswith(said) for step in check() if step.status == "warning")
    assert any(said in line for line in run(export_of("events", target, hour), partition_key(hour)).log)


def test_others_who_may_create_in_the_schema_are_a_warning(check: Check, target: Target, neighbour: str) -> None:
    schema = target.schema
    target.execute(f"GRANT CREATE ON SCHEMA {schema} TO {neighbour}")
    assert f'REVOKE CREATE ON SCHEMA "{schema}" FROM "{neighbour}";' in saying(check(), "warning", "Schema")
    target.execute(f"GRANT CREATE ON SCHEMA {schema} TO PUBLIC")
    assert f'REVOKE CREATE ON SCHEMA "{schema}" FROM PUBLIC;' in saying(check(), "warning", "Schema")


@pytest.fixture
def neighbour(target: Target) -> Iterator[str]:
    """Another role of the database."""
    role = f"{target.schema}_neighbour"
    target.execute(f"CREATE ROLE {role} LOGIN", f"GRANT USAGE ON SCHEMA {target.schema} TO {role}")
    yield role
    target.execute(f"DROP OWNED BY {role} CASCADE", f"DROP ROLE {role}")


def test_a_certificate_of_any_public_authority_is_a_warning(check: Check) -> None:
    steps = check(postgres={"verify_server_identity": "ca", "root_certificate": "system"})
    assert "any public authority" in saying(steps, "warning", "Postgres, login")


def test_a_ledger_of_another_role_needs_a_grant(check: Check, target: Target) -> None:
    target.execute("CREATE TABLE pg_exports_keys (x int)")
    failed, not_reached = failing(check())
    assert (failed.name, not_reached) == ("Ledger", [])
    assert f'GRANT INSERT, SELECT, UPDATE ON "{target.schema}"."pg_exports_keys" TO "{ROLE}";' in failed.text


# The job


def run_job(
    setup: Setup, clickhouse: ClickHouseResource, postgres: PostgresResource, *, inline: bool = False
) -> tuple[dg.ExecuteInProcessResult, list[dg.EventLogEntry]]:
    resources = {"clickhouse": clickhouse, "postgres_io_manager": PostgresIOManager(postgres=postgres)}
    job = connection_check.job(setup, postgres if inline else "postgres_io_manager")
    defs = dg.Definitions(jobs=[job], resources={"clickhouse": clickhouse} if inline else resources)
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def(f"{setup.export}_check").execute_in_process(
            instance=instance, raise_on_error=False
        )
        return result, list(instance.all_logs(result.run_id))


def kept_in(metadata: Mapping[str, dg.MetadataValue[Any]]) -> list[Step]:
    table = metadata[STEPS]
    assert isinstance(table, dg.TableMetadataValue)
    return [Step(**record.data) for record in table.records]  # type: ignore[arg-type]  # as the job made them


@pytest.mark.parametrize("inline", [False, True], ids=["a connection of resources", "a connection of its own"])
def test_the_job_logs_each_step_and_keeps_them(inline: bool, source: Source, target: Target) -> None:
    setup = setup_of("events", target.schema)
    result, entries = run_job(setup, source.resource(), target.resource(), inline=inline)
    assert result.success
    [output] = [event.step_output_data for event in result.all_events if event.is_successful_output]
    kept = kept_in(output.metadata)
    assert kept == list(connection_check.steps(setup, source.resource(), target.resource()))
    messages = [entry.user_message for entry in entries]
    assert all(f"{step.name}: {step.status}. {step.text}" in messages for step in kept)


def test_the_job_fails_with_what_failed_and_is_not_tried_again(source: Source, target: Target) -> None:
    wrong = {"password": "not-this-one"}
    result, entries = run_job(setup_of("events", "missing"), source.resource(**wrong), target.resource())
    assert not result.success
    [failure] = [event.step_failure_data.user_failure_data for event in result.all_events if event.is_step_failure]
    assert failure
    assert "Check `user` and `password` (CLICKHOUSE_USER" in str(failure.description)
    assert 'CREATE SCHEMA "missing"' in str(failure.description)
    assert [step.name for step in kept_in(failure.metadata)] == NAMES
    assert [entry.level for entry in entries if entry.user_message.startswith("Schema: failed.")] == [40]
    for entry in entries:
        assert "not-this-one" not in str(entry)
        assert target.sandbox.password not in str(entry)


def test_the_job_is_found_by_its_tags_and_waits_for_no_pool(source: Source, target: Target) -> None:
    job = connection_check.job(setup_of("events", target.schema), "postgres_io_manager")
    assert job.tags == {REASON: CONNECTION_CHECK, EXPORT: "events"}
    assert [node.definition.pools for node in job.nodes] == [set()]


# The command


@pytest.fixture
def project(source: Source, target: Target, tmp_path: Path) -> Path:
    """A Dagster project of a user's own, with two exports and a `.env`."""
    environment = target.sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database}
    del environment["DAGSTER_POSTGRES_URL"]
    (tmp_path / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in environment.items()))
    (tmp_path / "pyproject.toml").write_text('[tool.dg.project]\nroot_module = "ours"\n')
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").touch()
    (tmp_path / "ours" / "definitions.py").write_text(
        f"""
from datetime import UTC, datetime

import dagster as dg

from pg_exports import connection_check
from pg_exports.defs import resources
from pg_exports.models import MODELS, Selection
from pg_exports.postgres.table import Destination


def check_of(model):
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    selection = Selection({TEAM}, moment, moment)
    setup = connection_check.Setup(model, MODELS[model], selection, Destination(None, "{target.schema}", model))
    return connection_check.job(setup, "postgres_io_manager")


@dg.definitions
def defs():
    return dg.Definitions.merge(resources.connections(), dg.Definitions(jobs=[check_of("events"), check_of("persons")]))
"""
    )
    return tmp_path


def command(folder: Path, *exports: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pg_exports.check", *exports],
        cwd=folder,
        env=os.environ | {"POSTGRES_USER": "what-the-file-overrides"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def command_here(project: Path, monkeypatch: pytest.MonkeyPatch, *exports: str) -> int:
    """The command in this process: its exit code."""
    for module in ("ours", "ours.definitions"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["check", *exports])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return check_command.main()


def test_the_command_prints_each_step_of_each_export(project: Path, target: Target) -> None:
    said = command(project)
    assert (said.returncode, said.stderr) == (0, "")
    lines = said.stdout.splitlines()
    assert lines[0] == "events"
    assert f'  passed      Schema            "{target.schema}": the role may use it, and create tables in it.' in lines
    others = lines[lines.index("persons") :]
    assert "  passed      Postgres, login   as above" in others
    assert any(f'"{target.schema}"."persons" is not there yet' in line for line in others)
    assert lines[-1] == "Nothing failed."
    assert relations(target) == []


def test_the_command_fails_where_a_step_does(
    project: Path, source: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.execute("DROP TABLE person SYNC")
    assert command_here(project, monkeypatch, "persons") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("persons\n")
    assert "  failed      Source tables" in said.out
    assert "A source table is missing" in said.out
    assert said.out.endswith("1 failed.\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "POSTGRES_HOST",
            "The environment variable POSTGRES_HOST is not set. Set it where Dagster runs, or in the .env file",
        ),
        ("another export", "There is no export another in this project. There are events, persons."),
        ("no project", "There is no Dagster project in this folder"),
        ("POSTGRES_PORT", "The environment variable POSTGRES_PORT must be a port number, not 'five'."),
        ("broken", "The definitions of ours.definitions do not load. SyntaxError: "),
    ],
)
def test_the_command_says_in_one_message_why_nothing_can_be_checked(
    name: str,
    message: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (project / ".env").read_text().splitlines()
    others = "\n".join(line for line in settings if not line.startswith(f"{name}="))
    exports = []
    if name == "another export":
        exports = ["another"]
    elif name == "no project":
        (project / "pyproject.toml").unlink()
    elif name == "broken":
        (project / "ours" / "definitions.py").write_text("def")
    else:
        (project / ".env").write_text(others + ("\nPOSTGRES_PORT=five\n" if name == "POSTGRES_PORT" else "\n"))
    assert command_here(project, monkeypatch, *exports) == 1
    said = "".join(capsys.readouterr())
    assert message in said
    assert "Traceback" not in said
