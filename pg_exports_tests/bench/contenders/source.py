"""The source of the contenders that read it themselves: ClickHouse over HTTPS, with its certificate verified."""

import contextlib
import os
from collections.abc import Iterator

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.client import Client

from pg_exports_tests.bench.contenders.task import Task

# As the product has it: the answer of an analytic query may take its time.
READ_TIMEOUT = 600


@contextlib.contextmanager
def client(task: Task) -> Iterator[Client]:
    """A client of the task's database."""
    opened = clickhouse_connect.get_client(
        interface="https",
        host=os.environ["CLICKHOUSE_HOST"],
        port=int(os.environ["CLICKHOUSE_PORT"]),
        username=os.environ["CLICKHOUSE_USER"],
        password=os.environ["CLICKHOUSE_PASSWORD"],
        database=task.database,
        ca_cert=os.environ["CLICKHOUSE_CA_CERTIFICATE"],
        send_receive_timeout=READ_TIMEOUT,
        autogenerate_session_id=False,
        # On one machine compression costs more than it saves; the product does without it, too.
        compress=False,
    )
    with contextlib.closing(opened):
        yield opened


def batches(task: Task) -> Iterator[pa.RecordBatch]:
    """The task's rows, batch by batch as they arrive; text is text, and times are microseconds in UTC."""
    with client(task) as opened, opened.query_arrow_stream(task.sql, dict(task.parameters)) as stream:
        yield from stream
