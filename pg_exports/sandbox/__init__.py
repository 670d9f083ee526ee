"""A disposable ClickHouse and a TLS Postgres with sample data, for the demo, `make dev` and the tests.

`servers` starts both as processes of their own: the real ClickHouse engine (`clickhouse_process` starts what
`clickhouse_server` serves of `clickhouse_engine`) and PostgreSQL (`postgres_server`, with `certificates`).
`source_tables` and the `sample_` modules fill ClickHouse. `python -m pg_exports.sandbox` is the command.
"""

from pg_exports.sandbox.servers import Sandbox, start, stop

__all__ = ["Sandbox", "start", "stop"]
