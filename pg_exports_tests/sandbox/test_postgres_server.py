"""The sandbox's Postgres: any number at once, never as root, gone when stopped, with a role that may do little."""

import json
import os
import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import psycopg2
import pytest

from pg_exports.sandbox import Sandbox, certificates, postgres_server, servers
from pg_exports.sandbox.postgres_server import PostgresSandboxError
from pg_exports.sandbox.servers import DATABASE, INSTANCE, ROLE


def test_several_start_at_once_run_as_another_user_than_root_and_are_gone_when_stopped(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        started = list(pool.map(postgres_server.start, [certificates.issue(tmp_path), None]))
    running = [sandbox.postgres, *started]
    assert len({server.port for server in running}) == len({server.folder for server in running}) == 3
    tls = [server.rows("SELECT current_setting('ssl')") for server in running]
    assert tls == [[("on",)], [("on",)], [("off",)]]
    owners = [(server.folder / "data" / "postmaster.pid").stat().st_uid for server in running]
    assert 0 not in owners
    for server in started:
        postgres_server.stop(server)
        assert not postgres_server.is_running(server)
        assert not server.folder.exists()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", server.port)) != 0
        postgres_server.stop(server)


def test_the_servers_log_has_every_statement_but_no_password(sandbox: Sandbox) -> None:
    log = sandbox.postgres.log.read_text(errors="replace")
    assert "CREATE DATABASE" in log
    for password in (sandbox.password, sandbox.instance_password):
        assert password not in log


def test_a_server_that_does_not_start_says_why_and_leaves_no_files() -> None:
    with pytest.raises(PostgresSandboxError, match="no_such_setting") as failed:
        postgres_server.start(None, settings={"no_such_setting": "1"})
    [folder] = re.findall(r"did not start in (\S+):", str(failed.value))
    assert not Path(folder).exists()


def test_the_sandbox_runs_the_programs_that_were_found(sandbox: Sandbox) -> None:
    assert sandbox.postgres.binaries == postgres_server.find_binaries()
    [(version,)] = sandbox.postgres.rows("SHOW server_version")
    program = sandbox.postgres.binaries / "postgres"
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert answer.removeprefix("postgres (PostgreSQL) ").strip() == version


def test_a_server_is_restarted_copied_and_stopped_by_the_programs_that_started_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binaries = postgres_server.find_binaries()
    monkeypatch.setenv(postgres_server.CHOSEN, str(binaries))
    server = postgres_server.start(None)
    try:
        assert server.binaries == binaries
        monkeypatch.setenv(postgres_server.CHOSEN, str(tmp_path))
        with pytest.raises(PostgresSandboxError, match=f"{tmp_path}, a folder without PostgreSQL's programs"):
            postgres_server.start(None)
        postgres_server.restart(server)
        standby = postgres_server.start_standby(server, None)
        postgres_server.stop(standby)
        assert standby.binaries == binaries
        assert not postgres_server.is_running(standby)
    finally:
        postgres_server.stop(server)
    assert not postgres_server.is_running(server)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another user")
def test_programs_that_the_servers_user_may_not_run_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    folder = tmp_path / "bin"
    folder.symlink_to(postgres_server.find_binaries())
    monkeypatch.setenv(postgres_server.CHOSEN, str(folder))
    with pytest.raises(PostgresSandboxError, match=f"{folder}/initdb cannot be run by the user `postgres`"):
        postgres_server.start(None)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restarted_server_is_where_it_was_with_what_was_committed_and_without_its_sessions(
    mode: Literal["fast", "immediate"],
) -> None:
    server = postgres_server.start(None, settings={"synchronous_commit": "on"})
    try:
        server.execute("CREATE TABLE things AS SELECT 1 AS n")
        with postgres_server.admin(server) as before, before.cursor() as cursor:
            postgres_server.restart(server, mode)
            with pytest.raises(psycopg2.Error, match=r"server closed the connection|terminating connection"):
                cursor.execute("SELECT n FROM things")
        assert server.rows("SELECT n FROM things") == [(1,)]
    finally:
        postgres_server.stop(server)


def test_a_standby_follows_its_primary_speaks_tls_and_writes_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    primary = postgres_server.start(certificates.issue(tmp_path))
    try:
        primary.execute("CREATE TABLE things AS SELECT 1 AS n")
        standby = postgres_server.start_standby(primary, sandbox.certificates)
        try:
            assert standby.port != primary.port
            assert standby.rows("SELECT pg_is_in_recovery(), current_setting('ssl'), n FROM things") == [
                (True, "on", 1)
            ]
            with pytest.raises(psycopg2.Error, match="read-only transaction"):
                standby.execute("INSERT INTO things VALUES (2)")
            primary.execute("INSERT INTO things VALUES (2)")
            deadline = time.monotonic() + 10
            while standby.rows("SELECT n FROM things ORDER BY n") != [(1,), (2,)]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            postgres_server.stop(standby)
    finally:
        postgres_server.stop(primary)


def test_the_superuser_is_reached_by_the_socket_in_the_private_folder_alone(sandbox: Sandbox) -> None:
    server = sandbox.postgres
    assert server.folder.stat().st_mode & 0o077 == 0
    with pytest.raises(psycopg2.Error, match="no password supplied"):
        psycopg2.connect(f"host=localhost port={server.port} user={postgres_server.SUPERUSER} dbname=postgres")
    with pytest.raises(psycopg2.Error, match=r"no pg_hba\.conf entry"):
        psycopg2.connect(
            f"host='{server.folder}' port={server.port} user={ROLE} password={sandbox.password} dbname={DATABASE}"
        )


def test_a_server_with_certificates_lets_nobody_in_without_tls(sandbox: Sandbox) -> None:
    uri = f"host=localhost port={sandbox.postgres.port} user={ROLE} password={sandbox.password} dbname={DATABASE}"
    with pytest.raises(psycopg2.Error, match="no encryption"):
        psycopg2.connect(f"{uri} sslmode=disable")


def test_the_role_has_the_narrow_grants_and_no_others(sandbox: Sandbox) -> None:
    [row] = sandbox.postgres.rows(
        f"SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolinherit, rolcanlogin"
        f" FROM pg_roles WHERE rolname = '{ROLE}'"
    )
    assert row == (False, False, False, False, False, False, True)
    assert sandbox.postgres.rows(
        f"SELECT count(*) FROM pg_auth_members WHERE member = (SELECT oid FROM pg_roles WHERE rolname = '{ROLE}')"
    ) == [(0,)]
    [row] = sandbox.postgres.rows(
        f"SELECT has_database_privilege('{ROLE}', '{DATABASE}', 'CONNECT'),"
        f" has_database_privilege('{ROLE}', '{DATABASE}', 'CREATE'),"
        f" has_database_privilege('{ROLE}', '{DATABASE}', 'TEMPORARY'),"
        f" has_database_privilege('{ROLE}', '{INSTANCE}', 'CONNECT'),"
        f" has_schema_privilege('{ROLE}', 'public', 'USAGE'),"
        f" has_schema_privilege('{ROLE}', 'public', 'CREATE')",
        database=DATABASE,
    )
    assert row == (True, False, False, False, True, True)


def test_a_grant_in_one_schema_gives_nothing_on_tables_that_another_role_made_there(sandbox: Sandbox) -> None:
    sandbox.postgres.execute("CREATE SCHEMA theirs", "CREATE TABLE theirs.things (a int)", database=DATABASE)
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, "theirs")
    try:
        privileges = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
        columns = ", ".join(f"has_table_privilege('{ROLE}', 'theirs.things', '{name}')" for name in privileges)
        assert sandbox.postgres.rows(f"SELECT {columns}", database=DATABASE) == [(False,) * len(privileges)]
    finally:
        sandbox.postgres.execute("DROP SCHEMA theirs CASCADE", database=DATABASE)


def test_a_certificate_is_for_localhost_alone_and_its_key_is_private(tmp_path: Path) -> None:
    issued = certificates.issue(tmp_path / "new" / "folder")
    assert issued.key.stat().st_mode & 0o077 == 0
    assert "PRIVATE KEY" not in issued.certificate.read_text() + issued.authority.read_text()
    assert certificates.issue(tmp_path / "another").authority.read_text() != issued.authority.read_text()


def test_a_sandbox_that_an_earlier_version_started_is_read_and_counts_as_not_running(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    kept = json.loads((sandbox.folder / "sandbox.json").read_text())
    del kept["source_password"], kept["clickhouse"]["tcp_port"], kept["postgres"]["binaries"]
    (tmp_path / "sandbox.json").write_text(json.dumps(kept))
    earlier = servers.load(tmp_path)
    assert earlier is not None
    assert earlier.clickhouse.pid == sandbox.clickhouse.pid
    assert not earlier.is_running
    assert sandbox.is_running


def test_what_is_kept_of_a_sandbox_can_be_read_by_its_owner_alone(sandbox: Sandbox) -> None:
    assert (sandbox.folder / "sandbox.json").stat().st_mode & 0o077 == 0
    assert servers.load(sandbox.folder) == sandbox
    assert sandbox.password not in sandbox.folder.name
