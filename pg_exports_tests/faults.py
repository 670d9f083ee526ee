"""What the tests of faults share: an interval that is big enough to break in its middle, places where a run can be held
there, and what of it is to be seen in the destination.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from urllib.parse import quote

from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.postgres_server import SUPERUSER, PostgresServer
from pg_exports.sandbox.servers import DATABASE, INSTANCE, ROLE
from pg_exports_tests.conftest import TEAM, RunExport, Source, Target, partition_key
from pg_exports_tests.source_rows import export_of

ROWS = 8_000
"""Events of a kilobyte: more than the kernel's buffers hold between an export and Postgres."""

INTERVAL = 9_000_000
"""Bytes from an export to Postgres for all of them, about."""

MIDDLE = 2_000_000
"""Bytes from an export to Postgres after which it is in the midst of copying them."""

NOTHING, EACH_ROW_ONCE = (0, 0, 0), (ROWS, ROWS, 1)
"""What `landed` gives of an interval that `fill` made."""

_HOLD = 20_261_101


def slowly(rows_a_second: int) -> dict[str, object]:
    """Settings of a connection to ClickHouse under which rows come over some seconds. ClickHouse waits for no more than a
    second at a time, and once for each part of a table that it reads: `fill` makes as many parts as it takes.
    """
    return {
        "max_threads": 1,
        "max_block_size": 100,
        "max_execution_speed": rows_a_second,
        "timeout_before_checking_execution_speed": 0,
    }


_KILOBYTE = '{"a": "' + 1000 * "x" + '"}'


def fill(source: Source, *hours: datetime, rows_of_a_part: int = 1000) -> None:
    """`ROWS` events in each hour, which ClickHouse answers in eight blocks, or one for each part of the table."""
    # Its blocks follow the table's parts.
    source.execute("SYSTEM STOP MERGES events")
    for hour in hours:
        source.execute(
            "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at) "
            "SELECT generateUUIDv4(number), '$pageview', {properties:String}, {hour:DateTime64(6)}, {team:Int64}, "
            "toString(number), {hour:DateTime64(6)}, {hour:DateTime64(6)} FROM numbers({rows:UInt64}) "
            f"SETTINGS max_block_size = {rows_of_a_part}, min_insert_block_size_rows = {rows_of_a_part}",
            {
                "properties": _KILOBYTE,
                "hour": hour.strftime("%Y-%m-%d %H:%M:%S"),
                "team": TEAM,
                "rows": ROWS,
            },
        )


def fill_persons(source: Source, hour: datetime) -> None:
    """`ROWS` persons in an hour, each with one distinct_id."""
    parameters = {"properties": _KILOBYTE, "hour": hour.strftime("%Y-%m-%d %H:%M:%S"), "team": TEAM, "rows": ROWS}
    source.execute(
        "INSERT INTO person (id, created_at, team_id, properties, is_identified, is_deleted, version, _timestamp) "
        "SELECT reinterpretAsUUID(number), {hour:DateTime64(6)}, {team:Int64}, {properties:String}, 1, 0, 1, "
        "{hour:DateTime64(6)} FROM numbers({rows:UInt64})",
        parameters,
    )
    source.execute(
        "INSERT INTO person_distinct_id2 (team_id, distinct_id, person_id, is_deleted, version, _timestamp) "
        "SELECT {team:Int64}, toString(number), reinterpretAsUUID(number), 0, 1, {hour:DateTime64(6)} "
        "FROM numbers({rows:UInt64})",
        {name: value for name, value in parameters.items() if name != "properties"},
    )


def make_tables(run: RunExport, target: Target, hour: datetime) -> None:
    """Have an export make its tables, by a run of an interval without rows."""
    empty = partition_key(hour - timedelta(hours=10))
    assert run(export_of("events", target, hour), empty, postgres=target.resource()).error is None


def landed(target: Target) -> tuple[int, int, int]:
    """Events that others can see, how many different ones, and intervals in the ledger that had rows."""
    [(events, different)] = target.rows("SELECT count(*), count(DISTINCT uuid) FROM events")
    [(intervals,)] = target.rows("SELECT count(*) FROM pg_exports_ledger WHERE rows_at_source > 0")
    return events, different, intervals


def eventually(
    holds: Callable[[], object], seconds: float = 30, *, otherwise: Callable[[], object] = lambda: ""
) -> None:
    """Wait until something holds. A question that takes long is asked less often, as what is awaited takes the same cores.

    `otherwise`: gives what the failure is to show.
    """
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if holds():
            return
        answered = time.monotonic()
        assert answered < deadline, f"Not within {seconds:.0f} s. {otherwise()}"
        time.sleep(min(max(0.02, 5 * (answered - asked)), 1))


@contextlib.contextmanager
def with_own_postgres(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with another Postgres, which may be restarted; the roles have the same passwords."""
    # A commit that was acknowledged must outlive a crash.
    server = postgres_server.start(sandbox.certificates, settings={"synchronous_commit": "on"})
    try:
        for role, password, database in (
            (ROLE, sandbox.password, DATABASE),
            (INSTANCE, sandbox.instance_password, INSTANCE),
        ):
            postgres_server.create_role(server, role, password)
            postgres_server.create_database(server, database)
            postgres_server.grant_export(server, role, database)
        yield dataclasses.replace(sandbox, postgres=server)
    finally:
        postgres_server.stop(server)


def storage_by_socket(server: PostgresServer, database: str) -> str:
    """Address of a database for Dagster's storage, by the server's socket as the superuser: for tests of something else,
    as a run opens more than a hundred connections to it, each of which takes five times as long with TLS and a password.
    """
    return f"postgresql://{SUPERUSER}@/{database}?host={quote(str(server.folder), safe='')}&port={server.port}"


class Hold:
    """A lock that every transaction waits for at one place of its way, until the test lets go of it."""

    def __init__(self, target: Target, release: Callable[[], None]) -> None:
        self._target = target
        self.release = release

    @property
    def is_reached(self) -> bool:
        """Whether a run is there."""
        return bool(self._target.rows(f"SELECT FROM pg_locks WHERE objid = {_HOLD} AND NOT granted"))

    def wait(self) -> None:
        """Wait until a run is there."""
        eventually(lambda: self.is_reached)


@contextlib.contextmanager
def held_before_commit(target: Target) -> Iterator[Hold]:
    """Hold runs that have copied their rows, before they say COMMIT. The tables must be there."""
    with _held(target, "CREATE TRIGGER hold AFTER INSERT OR UPDATE") as hold:
        yield hold


@contextlib.contextmanager
def held_in_commit(target: Target) -> Iterator[Hold]:
    """Hold runs that have said COMMIT, in the midst of it. The tables must be there."""
    with _held(
        target, "CREATE CONSTRAINT TRIGGER hold AFTER INSERT OR UPDATE", "DEFERRABLE INITIALLY DEFERRED"
    ) as hold:
        yield hold


@contextlib.contextmanager
def _held(target: Target, trigger: str, when: str = "") -> Iterator[Hold]:
    target.execute(
        f"""
        CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (SELECT FROM "{target.schema}".events) THEN
                PERFORM pg_advisory_xact_lock_shared({_HOLD});
            END IF;
            RETURN NULL;
        END
        $$
        """,
        f"{trigger} ON pg_exports_ledger {when} FOR EACH ROW EXECUTE FUNCTION hold()",
    )
    with (
        postgres_server.admin(target.sandbox.postgres, DATABASE) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(f"SELECT pg_advisory_lock({_HOLD})")

        def release() -> None:
            cursor.execute("SELECT pg_advisory_unlock_all()")

        try:
            yield Hold(target, release)
        finally:
            release()
