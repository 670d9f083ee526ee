"""A disposable ClickHouse and a TLS Postgres with sample data, for the demo, `make dev` and the tests.

`servers` starts both as processes of their own: ClickHouse's own server (`clickhouse_process` starts `clickhouse_server`,
which runs `clickhouse_engine` as `clickhouse_config` configures it) and PostgreSQL (`postgres_server`, with `certificates`).
`source_tables` and the `sample_` modules fill ClickHouse. `python -m pg_exports.sandbox` is the command.
"""

from pg_exports.sandbox.servers import Sandbox, start, stop

__all__ = ["Sandbox", "start", "stop"]
