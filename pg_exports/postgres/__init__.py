"""The destination: a Postgres connection, and the way of an interval's rows into a table.

`resource`, `tls` and `session` are the connection; `table` and `types` what is there and how to send it; `ledger`,
`ingest` and `merge` one interval's transaction; `io_manager` is the door that Dagster knocks at.
"""

from pg_exports.postgres.io_manager import PostgresIOManager
from pg_exports.postgres.resource import PostgresResource

__all__ = ["PostgresIOManager", "PostgresResource"]
