"""What reaches Postgres: the statements of runs, as its own log has them, and the transactions that they stand in."""

import json
import os
import re
import signal
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pg_exports import PostgresExport
from pg_exports.errors import DestinationError
from pg_exports.models.events import EVENTS
from pg_exports.postgres import merge
from pg_exports.postgres import table as tables
from pg_exports.postgres.merge import Merged
from pg_exports.postgres.session import Session
from pg_exports.postgres.table import Destination
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.postgres.test_ingest import copy, event

OURS = re.compile(rf"^\S+ \S+ \S+ \[\d+\] {ROLE}@{DATABASE} LOG:  (?:statement|execute [^:]*): ", re.MULTILINE)
NEXT_LINE = re.compile(r"^\d{4}-\d\d-\d\d ", re.MULTILINE)


def statements_since(target: Target, offset: int) -> list[str]:
    """The role's statements that the server wrote to its log after a byte of it, each whole."""
    log = target.sandbox.postgres.log.read_bytes()[offset:].decode(errors="replace")
    starts = [match.end() for match in OURS.finditer(log)]
    return [NEXT_LINE.split(log[start:], maxsplit=1)[0] for start in starts]


def log_size(target: Target) -> int:
    return target.sandbox.postgres.log.stat().st_size


def fill(source: Source, at: datetime, version: int) -> None:
    """One new event, and one person and one session in a new state."""
    source.insert(
        "events",
        {
            "uuid": uuid.uuid4(),
            "event": "it's; DROP TABLE events --",
            "properties": json.dumps({"$set": {"version": version}}),
            "timestamp": at,
            "team_id": TEAM,
            "distinct_id": "a",
            "elements_chain": "",
            "created_at": at,
            "person_id": uuid.uuid4(),
            "person_properties": "{}",
            "_timestamp": at,
            "_offset": version,
            "inserted_at": at,
        },
    )
    person_id = uuid.UUID(int=1)
    stamped: dict[str, object] = {"is_deleted": 0, "version": version, "_timestamp": at, "_offset": version}
    source.insert(
        "person",
        {"id": person_id, "created_at": at, "team_id": TEAM, "properties": "{}", "is_identified": 1} | stamped,
    )
    source.insert(
        "person_distinct_id2",
        {"team_id": TEAM, "distinct_id": "a", "person_id": person_id, "_partition": 0} | stamped,
    )


@pytest.fixture
def exports(target: Target, hour: datetime) -> list[PostgresExport]:
    settings: dict[str, Any] = {"team_id": TEAM, "schema": target.schema, "start": hour - timedelta(hours=24)}
    return [PostgresExport(model=model, **settings) for model in ("events", "persons", "sessions")]


def test_runs_and_reruns_only_insert_select_and_update_on_the_destinations(
    source: Source, target: Target, run: RunExport, hour: datetime, exports: list[PostgresExport]
) -> None:
    offset = log_size(target)
    for version in (1, 2):
        fill(source, hour, version)
        for export in exports:
            assert run(export, partition_key(hour)).error is None
    assert target.rows("SELECT count(*), max(event) FROM events") == [(2, "it's; DROP TABLE events --")]
    assert target.rows("SELECT person_version FROM persons") == [(2,)]
    sent = statements_since(target, offset)
    staging = rf'"{target.schema}"."pg_exports_staging_\w+"'
    assert {statement.split()[0] for statement in sent} >= {"BEGIN", "COMMIT", "COPY", "CREATE", "DROP"}
    for statement in sent:
        if statement.startswith("DROP"):
            assert re.fullmatch(rf"DROP TABLE {staging}\s*", statement)
        if statement.startswith("CREATE"):
            name = rf'"{target.schema}"."(?:events|persons|sessions|pg_exports_\w+)"'
            assert re.match(rf"CREATE (?:TABLE IF NOT EXISTS {name} \(|UNLOGGED TABLE {staging} AS)", statement)
        # Whole words anywhere, as a statement may begin with WITH or COPY ( ... ).
        assert not re.search(r"\b(DELETE|TRUNCATE|ALTER|GRANT|REVOKE|TEMPORARY|TEMP)\b", statement, re.IGNORECASE)
    assert sum("it's; DROP TABLE events" in statement for statement in sent) == 0


def test_adbcs_copies_stand_in_the_log_and_name_the_table_and_its_columns(
    source: Source, target: Target, run: RunExport, hour: datetime, exports: list[PostgresExport]
) -> None:
    offset = log_size(target)
    fill(source, hour, 1)
    for export in exports[:2]:
        run(export, partition_key(hour))
    copies = [statement for statement in statements_since(target, offset) if "FROM STDIN" in statement]
    assert len(copies) == 2
    assert copies[0].startswith(f'COPY "{target.schema}" . "events" ("uuid", "event", "properties"')
    assert copies[1].startswith(f'COPY "{target.schema}" . "pg_exports_staging_')
    assert all(copy.rstrip().endswith("FROM STDIN WITH (FORMAT binary)") for copy in copies)


def test_no_password_stands_in_the_log_of_a_run_or_of_the_server(
    source: Source, target: Target, run: RunExport, hour: datetime, exports: list[PostgresExport]
) -> None:
    offset = log_size(target)
    fill(source, hour, 1)
    secret = target.sandbox.password
    done = run(exports[0], partition_key(hour))
    wrong = run(exports[0], partition_key(hour), postgres=target.resource(password="not-the-password"))
    assert wrong.error is not None
    assert "not-the-password" not in wrong.error + " ".join(wrong.log)
    assert secret not in " ".join(done.log) + str(done.metadata)
    assert secret not in target.sandbox.postgres.log.read_bytes()[offset:].decode()


def test_a_transaction_is_rolled_back_whatever_ends_it_and_the_session_goes_on(target: Target) -> None:
    target.execute("CREATE TABLE things (n int)", f"GRANT INSERT, SELECT ON things TO {ROLE}")
    insert = f"INSERT INTO {target.schema}.things VALUES (1)"

    def insert_and(session: Session, failure: BaseException | None) -> None:
        with session.transaction():
            session.execute(insert, doing="inserting")
            if failure:
                raise failure
            session.execute("SELECT 1 / 0", doing="dividing")

    with target.resource().session() as session:
        for failure in (KeyboardInterrupt(), ValueError(), None):
            with pytest.raises(type(failure) if failure else DestinationError):
                insert_and(session, failure)
        assert target.count("things") == 0
        with session.transaction():
            session.execute(insert, doing="inserting")
    assert target.count("things") == 1


def test_a_transaction_writes_where_the_role_defaults_to_reading_and_sees_what_others_commit(target: Target) -> None:
    defaults = ("default_transaction_read_only = on", "default_transaction_isolation = 'serializable'")
    target.sandbox.postgres.execute(*(f"ALTER ROLE {ROLE} SET {default}" for default in defaults))
    try:
        with target.resource().session() as session, session.transaction():
            [row] = session.rows(
                "SELECT current_setting('transaction_read_only'), current_setting('transaction_isolation'),"
                " current_setting('lock_timeout') <> '0', current_setting('idle_in_transaction_session_timeout') <> '0'",
                doing="asking",
            )
    finally:
        target.sandbox.postgres.execute(f"ALTER ROLE {ROLE} RESET ALL")
    assert row == ("off", "read committed", True, True)


def test_values_are_bound_whatever_they_hold(target: Target) -> None:
    values = ("'; DROP TABLE x; --", "$1", "%s {0} \\ \n 🦔", "")
    with target.resource().session() as session:
        for value in values:
            assert session.rows("SELECT $1::text", value, doing="asking") == [(value,)]
        assert session.rows("SELECT $1::bigint, $2::bool", 2**62, True, doing="asking") == [(2**62, True)]
        assert session.arrow("SELECT $1::text AS a", "x", doing="asking").to_pydict() == {"a": ["x"]}


PARAMETERS = [
    datetime(2026, 1, 1, tzinfo=UTC),
    datetime(2026, 1, 1),
    "text",
    2**62,
    1.5,
    True,
    None,
    b"bytes",
    ["a", "b"],
]


def test_no_parameter_and_no_copy_ends_the_transaction_that_it_stands_in(target: Target) -> None:
    """ADBC says BEGIN and COMMIT of its own around a parameter with a time zone."""
    with target.resource().session() as session:
        table = tables.ensure(session, Destination(None, target.schema, "events"), EVENTS)
        with session.transaction():
            before = session.rows("SELECT pg_current_xact_id()::text", doing="asking")
            for value in PARAMETERS:
                session.rows("SELECT $1", value, doing="asking")
                session.arrow("SELECT $1", value, doing="asking")
                assert session.rows("SELECT pg_current_xact_id()::text", doing="asking") == before, value
            copy(session, table, "events", event(1), event(2, timestamp=None))
            with merge.staging_table(session, table) as staging:
                copy(session, table, staging, event(2), event(3))
                assert merge.merge(session, table, staging, merge.snapshot(session)) == Merged(1, 0)
            assert session.rows("SELECT pg_current_xact_id()::text", doing="asking") == before
            assert target.count("events") == 0
    assert target.count("events") == 3


def test_an_interrupt_ends_a_statement_that_the_server_is_at_work_on_and_undoes_its_transaction(target: Target) -> None:
    def interrupted(session: Session) -> None:
        with session.transaction():
            session.execute(f'CREATE TABLE "{target.schema}".made (n int)', doing="creating a table")
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            session.execute("SELECT pg_sleep(60)", doing="sleeping")

    began = time.monotonic()
    with target.resource().session() as session, pytest.raises(KeyboardInterrupt):
        interrupted(session)
    assert time.monotonic() - began < 5
    # Nobody waits for what it had locked.
    target.execute("CREATE TABLE made (n int)")
    assert time.monotonic() - began < 5
