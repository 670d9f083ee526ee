"""What a contender is asked to do, and how it answers. Only the standard library: imports count in its memory.

The bench hands the task over in the environment; passwords are nowhere else.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

TABLE = "events"
"""The name of the table, in each contender's own schema."""

VARIABLE = "PG_EXPORTS_BENCH_TASK"


@dataclass(frozen=True)
class Task:
    """One day of events, from a query to a table.

    Attributes:
        database: ClickHouse's.
        sql, parameters: the query of the rows, with `{name:Type}` placeholders and their values.
        json_columns: those of its columns that are documents, as text.
        schema: Postgres's; it is there, and empty.
        create_table: the statement that creates the table with the types that the product gives it.
        file: the same rows as a file of Postgres's binary COPY.
    """

    database: str
    sql: str
    parameters: Mapping[str, object]
    json_columns: tuple[str, ...]
    schema: str
    create_table: str
    file: str

    @property
    def environment(self) -> dict[str, str]:
        """The task as `given` reads it."""
        return {VARIABLE: json.dumps(vars(self) | {"parameters": dict(self.parameters)})}


def given() -> Task:
    """The task of this process."""
    fields = json.loads(os.environ[VARIABLE])
    return Task(**(fields | {"json_columns": tuple(fields["json_columns"])}))


def timed(load: Callable[[Task], object]) -> None:
    """Do this process's task, and say how long it took. What `load` returns is shown beside its time, if it is text."""
    task = given()
    began = time.monotonic()
    said = load(task)
    answer = {"seconds": time.monotonic() - began, "remark": said if isinstance(said, str) else None}
    sys.stdout.write(json.dumps(answer) + "\n")


def conninfo(*, password: bool = True) -> str:
    """Libpq's connection string of the destination: the narrow role, over TLS with certificate and host verified."""
    where = _destination()
    return " ".join(f"{name}='{value}'" for name, value in where.items() if password or name != "password")


def uri() -> str:
    """The same as a URI."""
    where = _destination()
    address = f"{where['user']}:{quote(where['password'], safe='')}@{where['host']}:{where['port']}/{where['dbname']}"
    return f"postgresql://{address}?sslmode={where['sslmode']}&sslrootcert={quote(where['sslrootcert'])}"


def _destination() -> dict[str, str]:
    return {
        "host": os.environ["POSTGRES_HOST"],
        "port": os.environ["POSTGRES_PORT"],
        "user": os.environ["POSTGRES_USER"],
        "password": os.environ["POSTGRES_PASSWORD"],
        "dbname": os.environ["POSTGRES_DATABASE"],
        "sslmode": "verify-full",
        "sslrootcert": os.environ["POSTGRES_ROOT_CERTIFICATE"],
    }
