"""The limit: psql's \\copy of a binary file that is there already. No source, no encoding; only Postgres works."""

import os
import subprocess

from pg_exports_tests.bench.contenders.task import TABLE, Task, conninfo, timed


def load(task: Task) -> None:
    """Create the table and copy the file into it, in one transaction."""
    copy = f"\\copy \"{task.schema}\".{TABLE} FROM '{task.file}' WITH (FORMAT binary)"
    # The password is in the environment: arguments can be read by everybody.
    options = ["--no-psqlrc", "--quiet", "--single-transaction", "--set", "ON_ERROR_STOP=1"]
    where = conninfo(password=False)
    variables = os.environ | {"PGPASSWORD": os.environ["POSTGRES_PASSWORD"]}
    subprocess.run(["psql", *options, "-d", where, "-c", task.create_table, "-c", copy], env=variables, check=True)


if __name__ == "__main__":
    timed(load)
