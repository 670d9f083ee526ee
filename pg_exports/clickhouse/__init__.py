"""The source: a ClickHouse connection, and a model's rows of one interval as a stream of Polars frames.

`resource` holds the connection, `arrow` knows when an answer is complete, `errors` says what a refusal means.
"""

from pg_exports.clickhouse.resource import ClickHouseResource

__all__ = ["ClickHouseResource"]
