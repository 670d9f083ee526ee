"""Events for a cluster to export: as many in each hour, each with a uuid of its own."""

from datetime import datetime

from pg_exports.sandbox import Sandbox
from pg_exports_tests.conftest import TEAM

_HALF_A_KILOBYTE = '{"a": "' + 500 * "x" + '"}'


def fill(sandbox: Sandbox, database: str, start: datetime, hours: int, rows: int) -> None:
    """Insert `rows` events into each of the hours."""
    with sandbox.clickhouse_client(database) as client:
        client.command(
            "INSERT INTO events (uuid, event, properties, timestamp, team_id, distinct_id, _timestamp, inserted_at) "
            "SELECT generateUUIDv4(number), '$pageview', {properties:String}, at, {team:Int64}, toString(number), at, at "
            "FROM (SELECT number, toDateTime64({start:String}, 6, 'UTC') + INTERVAL intDiv(number, {rows:UInt64}) HOUR AS at "
            "FROM numbers({all:UInt64}))",
            {
                "properties": _HALF_A_KILOBYTE,
                "team": TEAM,
                "start": start.strftime("%Y-%m-%d %H:%M:%S"),
                "rows": rows,
                "all": hours * rows,
            },
        )
