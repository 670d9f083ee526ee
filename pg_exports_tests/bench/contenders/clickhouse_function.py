"""ClickHouse's own way: `INSERT INTO FUNCTION postgresql(...) SELECT ...`, run by ClickHouse's server."""

import os

import psycopg

from pg_exports_tests.bench.contenders import source
from pg_exports_tests.bench.contenders.task import TABLE, Task, conninfo, timed

# ClickHouse hands no TLS settings to libpq, which takes them from the server's environment: the bench sets them there.
INSERT = """
INSERT INTO FUNCTION postgresql({address:String}, {database:String}, {table:String}, {user:String}, {password:String},
    {schema:String})
"""


def load(task: Task) -> None:
    """Create the table, and have ClickHouse fill it."""
    with psycopg.connect(conninfo()) as connection:
        connection.execute(task.create_table)
    destination = {
        "address": f"{os.environ['POSTGRES_HOST']}:{os.environ['POSTGRES_PORT']}",
        "database": os.environ["POSTGRES_DATABASE"],
        "table": TABLE,
        "user": os.environ["POSTGRES_USER"],
        "password": os.environ["POSTGRES_PASSWORD"],
        "schema": task.schema,
    }
    with source.client(task) as client:
        client.command(INSERT + task.sql, {**task.parameters, **destination})


if __name__ == "__main__":
    timed(load)
