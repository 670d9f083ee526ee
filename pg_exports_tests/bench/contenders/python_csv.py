"""Python's csv and psycopg: record batches become rows, rows a CSV file, and each full file a COPY.

The technique of PostHog's own batch exports to Postgres.
"""

import csv
import io
import tempfile
from typing import IO

import psycopg

from pg_exports_tests.bench.contenders import source
from pg_exports_tests.bench.contenders.task import TABLE, Task, conninfo, timed

BYTES_A_FILE = 50 * 1024 * 1024
BYTES_A_READ = 1024 * 1024


def load(task: Task) -> None:
    """Create the table and copy the files into it, in one transaction."""
    with (
        psycopg.connect(conninfo()) as connection,
        connection.cursor() as cursor,
        tempfile.TemporaryFile() as file,
        io.TextIOWrapper(file, encoding="utf-8", newline="") as text,
    ):
        cursor.execute(task.create_table)
        writer = csv.writer(text)
        for batch in source.batches(task):
            writer.writerows(list(row.values()) for row in batch.to_pylist())
            text.flush()
            if file.tell() >= BYTES_A_FILE:
                _copy(cursor, task, file)
        _copy(cursor, task, file)


def _copy(cursor: psycopg.Cursor, task: Task, file: IO[bytes]) -> None:
    """Send the file, and empty it. NULL and '' are both nothing between two commas: NULL."""
    file.seek(0)
    with cursor.copy(f'COPY "{task.schema}".{TABLE} FROM STDIN WITH (FORMAT csv)') as copy:
        while data := file.read(BYTES_A_READ):
            copy.write(data)
    file.seek(0)
    file.truncate()


if __name__ == "__main__":
    timed(load)
