"""Any role of a database may hold the locks by which runs wait for one another: an error names who does."""

from collections.abc import Iterator
from datetime import datetime

import psycopg2
import pytest

from pg_exports.postgres import session
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.schemas import CREATION_LOCK
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import event, export_of


@pytest.fixture
def stranger(sandbox: Sandbox, target: Target) -> Iterator[psycopg2.extensions.connection]:
    """In a transaction as a role that has no right in the database."""
    role, password = f"{target.schema}_stranger", postgres_server.new_password()
    postgres_server.create_role(sandbox.postgres, role, password)
    sandbox.postgres.execute(f"GRANT CONNECT ON DATABASE {quoted(DATABASE)} TO {quoted(role)}")
    connection = psycopg2.connect(
        host=HOST,
        port=sandbox.postgres.port,
        user=role,
        password=password,
        dbname=DATABASE,
        sslmode="verify-full",
        sslrootcert=str(sandbox.certificates.authority),
        application_name="curious",
    )
    yield connection
    connection.close()
    revoke = f"REVOKE CONNECT ON DATABASE {quoted(DATABASE)} FROM {quoted(role)}"
    sandbox.postgres.execute(revoke, f"DROP ROLE {quoted(role)}")


@pytest.mark.parametrize("lock", ["of an hour", "to create tables"])
def test_who_holds_a_lock_that_a_run_waits_for_in_vain_is_named(
    source: Source,
    target: Target,
    run: RunExport,
    hour: datetime,
    stranger: psycopg2.extensions.connection,
    lock: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    monkeypatch.setattr(session, "LOCK_TIMEOUT", 0.3)
    with stranger.cursor() as cursor:
        if lock == "to create tables":
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [CREATION_LOCK])
        else:
            keys = f'pg_exports: "{target.schema}"."events"', int(hour.timestamp()) // 3600
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext(%s), %s)", keys)
        stalled = run(export, partition_key(hour))
        assert "lock timeout" in str(stalled.error)
        pid = stranger.info.backend_pid
        assert f"Process {pid} of the role {stranger.info.user} (curious) holds it" in str(stalled.error)
        assert f"pg_terminate_backend({pid})" in str(stalled.error)
    stranger.rollback()
    assert run(export, partition_key(hour)).counts == (1, 0, 0)


def test_of_two_runs_the_one_that_waits_in_vain_is_told_of_the_other(
    source: Source, target: Target, run: RunExport, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.insert("events", event(hour))
    export = export_of("events", target, hour)
    monkeypatch.setattr(session, "LOCK_TIMEOUT", 0.3)
    with target.resource().session() as other, other.transaction():
        other.execute("SELECT pg_advisory_xact_lock(hashtext($1))", CREATION_LOCK, doing="creating tables")
        stalled = run(export, partition_key(hour))
    assert f"of the role {ROLE} (pg_exports) holds it: another run" in str(stalled.error)
