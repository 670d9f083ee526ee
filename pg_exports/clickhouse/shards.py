"""Whether the shards of a Distributed table send all their rows.

A shard is asked as a user of its own, with a profile of its own. Some settings of that profile are put around the query that
the shard gets, and the asking server does not let a query undo them there.
"""

from collections.abc import Mapping

from clickhouse_connect.driver.exceptions import Error

from pg_exports.clickhouse.distributed import SourceTable
from pg_exports.clickhouse.http_client import QuietClient
from pg_exports.clickhouse.settings import Value, clause
from pg_exports.errors import SourceError
from pg_exports.models.model import backquoted

ROWS = 1_000_000
"""Rows that each shard must send. With a single shard, a higher `limit` goes unnoticed."""

_UNLIMITED: Mapping[str, Value] = {
    "max_result_rows": 0,
    "max_result_bytes": 0,
    "force_primary_key": 0,
    "force_index_by_date": 0,
    "force_data_skipping_indices": "",
}
"""What would forbid the check, and not what an export reads."""

_SIGNS = (
    10,  # NOT_FOUND_COLUMN_IN_BLOCK: the shard's answer has other columns than the query
    47,  # UNKNOWN_IDENTIFIER: a filter names a column of the table, which the answer does not have
)
"""Codes of the errors that tell of a changed answer, too."""


def check(client: QuietClient, table: SourceTable, settings: Mapping[str, Value], address: str) -> None:
    """Make sure that no shard of a Distributed table changes its answers.

    Each shard is asked for rows that it generates itself. It reads nothing of the table, so neither the table's size nor
    concurrent writes matter.

    Args:
        client: a connection to the server that is asked.
        table: whose shards are looked at.
        settings: of the query.
        address: of the server, for the message.

    Raises:
        SourceError: a shard does.
        Error: of clickhouse-connect's, the shards could not be asked.
    """
    name = f"{backquoted(table.database)}.{backquoted(table.name)}"
    # Answers that are not merged can be told apart; more come of shards whose tables are Distributed, too. Where several are
    # merged, one with anything around it is an error.
    sql = f"""
SELECT sum(one), max(shards), (SELECT count() FROM {name} WHERE 0 SETTINGS distributed_group_by_no_merge = 0) AS merged
FROM (
    SELECT arrayJoin(arrayWithConstant({ROWS} + count(), toUInt8(1))) AS one, shardCount() AS shards
    FROM {name}
    WHERE 0
    SETTINGS distributed_group_by_no_merge = 1
)
{clause({**settings, **_UNLIMITED})}"""
    try:
        [(rows, shards, _)] = client.query(sql.strip()).result_rows
    except Error as error:
        if error.code not in _SIGNS:
            raise
        rows = shards = 0
    if rows == 0 or rows % ROWS or rows < shards * ROWS:
        raise SourceError(
            f"A shard of the Distributed table {table.database}.{table.name} on ClickHouse at {address} changes its answers: "
            "the profile of the user who asks it has `limit`, `offset`, `filter`, `additional_result_filter`, `select` or "
            "`output_format`, which no query can undo on a shard. An administrator of ClickHouse can take them out of the "
            "profile. That user is the one in the cluster's definition, or the connection's own if the definition has a "
            "`secret`."
        )
