"""Polars alone: the whole answer as one frame, `write_database` by ADBC, documents as plain text."""

import polars as pl

from pg_exports_tests.bench.contenders import source
from pg_exports_tests.bench.contenders.task import TABLE, Task, timed, uri


def load(task: Task) -> None:
    """Read everything, then write it; Polars creates the table."""
    with source.client(task) as client:
        frame = pl.DataFrame(pl.from_arrow(client.query_arrow(task.sql, dict(task.parameters))))
    frame.write_database(f"{task.schema}.{TABLE}", uri(), engine="adbc")


if __name__ == "__main__":
    timed(load)
