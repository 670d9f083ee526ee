"""What the bench exports: a day of events, hours of them, or people alone, each in a ClickHouse database of its own; and how
many rows of a model a day has.

The rows are those of the sandbox's sample, which the same arguments make again. Postgres's side is here too, as far as
it is no figure: an empty schema in which the role may create tables. The caller drops what it has used.
"""

import contextlib
import functools
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from pg_exports.models import MODELS, Selection
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox, postgres_server, sample_data, source_tables
from pg_exports.sandbox.sample_people import MAPPINGS, PERSONS
from pg_exports.sandbox.servers import DATABASE, ROLE

TEAM = 1
"""Whose rows are exported."""

TEAM_SHARE = 0.79
"""Of the sample's events; the others are another team's."""

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@functools.cache
def midnight() -> datetime:
    """When the UTC day ended that was the latest when this was first asked for: a bench that runs past midnight stays
    with its data.
    """
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def key(start: datetime) -> str:
    """The partition key of the hourly interval that begins then."""
    return f"{start:%Y-%m-%d-%H:%M}"


def day(sandbox: Sandbox, database: str, *, events: int) -> tuple[datetime, datetime]:
    """Fill a new database with events of both teams that were all inserted within one day. Gives the day."""
    return hours(sandbox, database, count=24, events=events)


def hours(sandbox: Sandbox, database: str, *, count: int, events: int) -> tuple[datetime, datetime]:
    """Fill a new database with the hours before the latest midnight. Gives the time from the first to the last."""
    end = midnight()
    source_tables.create_tables(sandbox.execute, database)
    sample_data.fill(sandbox.execute, database, end=end, hours=count, events=events)
    return end - count * HOUR, end


def equal_hours(sandbox: Sandbox, database: str, *, count: int, events: int) -> tuple[datetime, datetime]:
    """The same with as many events in each hour, where `hours` follows the rhythm of a day."""
    end = midnight()
    source_tables.create_tables(sandbox.execute, database)
    for back in range(count):
        sample_data.fill(sandbox.execute, database, end=end - back * HOUR, hours=1, events=events, seed=back + 1)
    return end - count * HOUR, end


def people(sandbox: Sandbox, database: str, *, count: int) -> tuple[datetime, datetime]:
    """Fill a new database with people of both teams, who did nothing, and were touched within one day. Gives the day."""
    end = midnight()
    whose = {
        "database": database,
        "seed": 1,
        "begin": sample_data.microseconds(end - DAY),
        "end": sample_data.microseconds(end),
        "empty": sample_data.microseconds(sample_data.empty_hour(end)),
        "people": count,
    }
    source_tables.create_tables(sandbox.execute, database)
    for table in sample_data.MERGING_TABLES:
        sandbox.execute(
            "SYSTEM STOP MERGES {database:Identifier}.{table:Identifier}", {"database": database, "table": table}
        )
    sandbox.execute(PERSONS, whose)
    sandbox.execute(MAPPINGS, whose)
    return end - DAY, end


# Some weeks is what events arrive late in the sample itself.
SPREAD = """
INSERT INTO {database:Identifier}.events
SETTINGS optimize_on_insert = 0
SELECT * REPLACE (timestamp - toIntervalDay(cityHash64(uuid) % {days:UInt16}) AS timestamp)
FROM {source:Identifier}.events
"""


def spread(sandbox: Sandbox, source: str, database: str, *, days: int) -> None:
    """Fill a new database with the events of another, inserted when they were, but of so many days before: as an import
    of old events brings them.
    """
    source_tables.create_tables(sandbox.execute, database)
    sandbox.execute("SYSTEM STOP MERGES {database:Identifier}.events", {"database": database})
    sandbox.execute(SPREAD, {"database": database, "source": source, "days": days})


def rows_of_day(sandbox: Sandbox, database: str, model: str, start: datetime) -> int:
    """What an export of one day should bring."""
    query = MODELS[model].query(Selection(TEAM, start, start + DAY))
    with sandbox.clickhouse_client(database) as client:
        [(rows,)] = client.query(f"SELECT count() FROM ({query.sql})", dict(query.parameters)).result_rows
    return int(rows)


@contextlib.contextmanager
def new_database(sandbox: Sandbox) -> Iterator[str]:
    """The name of a ClickHouse database that does not exist yet, and is gone after the block."""
    database = f"bench_{uuid.uuid4().hex[:12]}"
    try:
        yield database
    finally:
        sandbox.execute(f"DROP DATABASE IF EXISTS {database} SYNC")


@contextlib.contextmanager
def new_schema(sandbox: Sandbox) -> Iterator[str]:
    """An empty schema with an export's narrow grants, for the block."""
    schema = f"bench_{uuid.uuid4().hex[:12]}"
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, schema)
    try:
        yield schema
    finally:
        sandbox.postgres.execute(f"DROP SCHEMA {quoted(schema)} CASCADE", database=DATABASE)
