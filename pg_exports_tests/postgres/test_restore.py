"""Tables that were restored from a dump by pg_dump: in whole or in part, in their own database or in another one."""

import subprocess
import uuid
from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports import PostgresExport
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.servers import DATABASE, ROLE
from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import HOUR, event, export_of, mapping, person

PERSON = uuid.UUID(int=1)


@pytest.fixture
def elsewhere(sandbox: Sandbox) -> Iterator[str]:
    """Another database, to which the role may connect."""
    database = f"elsewhere_{uuid.uuid4().hex[:12]}"
    postgres_server.create_database(sandbox.postgres, database)
    sandbox.postgres.execute(f"GRANT CONNECT ON DATABASE {database} TO {ROLE}")
    yield database
    sandbox.postgres.execute(f"DROP DATABASE {database} WITH (FORCE)")


def dump(target: Target, *options: str) -> str:
    """The dump of the test's schema, as a script."""
    server = target.sandbox.postgres
    command = [
        str(server.binaries / "pg_dump"),
        "--schema",
        target.schema,
        *options,
        "-d",
        server.admin_uri_of(DATABASE),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    # pg_dump sets what servers before 17 do not have, if it is newer itself.
    return ran.stdout.replace("SET transaction_timeout = 0;\n", "")


def restore(target: Target, script: str, database: str = DATABASE) -> None:
    """Run a dump as the superuser."""
    server = target.sandbox.postgres
    command = [str(server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", server.admin_uri_of(database)]
    ran = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def fill(source: Source, hour: datetime) -> None:
    """An hour with two events and one person."""
    source.insert("events", event(hour), event(hour))
    source.insert("person", person(hour, PERSON, 1))
    source.insert("person_distinct_id2", mapping(hour, "a", PERSON))


def fill_further(source: Source, hour: datetime) -> None:
    """An hour with two events, in which the person changed."""
    source.insert("events", event(hour), event(hour))
    source.insert("person", person(hour, PERSON, 2))


def exports_of(target: Target, hour: datetime, database: str = DATABASE) -> tuple[PostgresExport, PostgresExport]:
    events, persons = (export_of(model, target, hour, database=database) for model in ("events", "persons"))
    return events, persons


def test_after_all_tables_are_restored_reruns_bring_what_came_after_the_dump_and_late_rows(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour - HOUR)
    earlier, later = partition_key(hour - HOUR), partition_key(hour)
    events, persons = exports_of(target, hour)
    for export in (events, persons):
        assert run(export, earlier).error is None
    script = dump(target)
    fill_further(source, hour)
    for export in (events, persons):
        assert run(export, later).error is None
    target.execute(f"DROP SCHEMA {quoted(target.schema)} CASCADE")
    restore(target, script)
    assert target.count("events") == 2
    assert run(events, earlier).counts == (0, 0, 2)
    assert run(events, later).counts == (2, 0, 0)
    assert run(persons, later).counts == (0, 1, 0)
    source.insert("events", event(hour - HOUR))
    assert run(events, earlier).counts == (1, 0, 2)
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(5, 5)]
    assert target.rows("SELECT distinct_id, person_version FROM persons") == [("a", 2)]


@pytest.mark.parametrize("options", [("--clean",), ("--data-only",)], ids=["made anew", "truncated and filled"])
def test_after_the_destinations_alone_are_restored_the_newer_ledger_hides_no_row(
    options: tuple[str, ...], source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    fill(source, hour - HOUR)
    earlier, later = partition_key(hour - HOUR), partition_key(hour)
    events, persons = exports_of(target, hour)
    for export in (events, persons):
        assert run(export, earlier).error is None
    script = dump(target, *options, "--table", f"{target.schema}.events", "--table", f"{target.schema}.persons")
    fill_further(source, hour)
    for export in (events, persons):
        assert run(export, later).error is None
    if "--data-only" in options:
        target.execute("TRUNCATE events, persons")
    restore(target, script)
    assert run(events, later).counts == (2, 0, 0)
    assert run(events, earlier).counts == (0, 0, 2)
    assert run(persons, later).counts == (0, 1, 0)
    assert target.rows("SELECT count(*), count(DISTINCT uuid) FROM events") == [(4, 4)]
    assert target.rows("SELECT distinct_id, person_version FROM persons") == [("a", 2)]


def test_tables_that_were_restored_into_another_database_go_on_there_and_those_that_stayed_go_on_too(
    source: Source, target: Target, run: RunExport, hour: datetime, elsewhere: str
) -> None:
    fill(source, hour - HOUR)
    earlier, later = partition_key(hour - HOUR), partition_key(hour)
    for export in exports_of(target, hour):
        assert run(export, earlier).error is None
    restore(target, dump(target), elsewhere)
    fill_further(source, hour)
    for database in (elsewhere, DATABASE):
        events, persons = exports_of(target, hour, database)
        assert run(events, earlier).counts == (0, 0, 2)
        assert run(events, later).counts == (2, 0, 0)
        assert run(persons, later).counts == (0, 1, 0)
        landed = f"SELECT count(*), count(DISTINCT uuid) FROM {quoted(target.schema, 'events')}"
        assert target.sandbox.postgres.rows(landed, database) == [(4, 4)]
