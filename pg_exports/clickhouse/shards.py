"""Whether the shards of a Distributed table send all their rows.

A shard is asked as a user of its own, with a profile of its own. Some settings of that profile are put around the query that
the shard gets, and the asking server does not let a query undo them there.
"""

from collections.abc import Mapping

from clickhouse_connect.driver.exceptions import Error

from pg_exports.clickhouse.http_client import QuietClient
from pg_exports.clickhouse.settings import DistributedTable, Value, clause
from pg_exports.errors import SourceError
from pg_exports.models.model import backquoted

ROWS = 1_000_000
"""Rows that the check has a cluster of one shard send at most."""

_SIGNS = (
    10,  # NOT_FOUND_COLUMN_IN_BLOCK: the shard's answer has other columns than the query, as it is one around it
    47,  # UNKNOWN_IDENTIFIER: a filter names a column of the table, which the answer does not have
)
"""Codes of the errors by which the check's query tells that a shard changes its answers."""


def check(client: QuietClient, table: DistributedTable, settings: Mapping[str, Value], address: str) -> bool:
    """Make sure that no shard changes its answers.

    Args:
        client: a connection to the server that is asked.
        table: whose shards are looked at.
        settings: of the query.
        address: of the server, for the message.

    Returns:
        whether that could be found out; what else is wrong the query itself will tell.

    Raises:
        SourceError: a shard does.
    """
    name = f"{backquoted(table.database)}.{backquoted(table.name)}"
    try:
        whole = _all_answer(client, name, settings) and _send_all_rows(client, name, settings)
    except Error as error:
        if error.code not in _SIGNS:
            return False
        whole = False
    if not whole:
        raise SourceError(
            f"A shard of the Distributed table {table.database}.{table.name} on ClickHouse at {address} changes its answers: "
            "the profile of the user who asks it has `limit`, `offset`, `filter`, `additional_result_filter`, `select` or "
            "`output_format`, which no query can undo on a shard. An administrator of ClickHouse can take them out of the "
            "profile. That user is the one in the cluster's definition, or the connection's own if the definition has a "
            "`secret`."
        )
    return True


def _all_answer(client: QuietClient, name: str, settings: Mapping[str, Value]) -> bool:
    """Whether each shard has an answer: a count is a row, even of no rows."""
    unmerged = {**settings, "distributed_group_by_no_merge": 1}
    answers = client.query(f"SELECT count(), shardCount() AS shards FROM {name} {clause(unmerged)}").result_rows
    return bool(answers) and len(answers) >= answers[0][1]


def _send_all_rows(client: QuietClient, name: str, settings: Mapping[str, Value]) -> bool:
    """Whether as many rows come as there are. Of several shards, one that puts a limit around its query names a count's
    column in another way, which is an error. A single one is given the whole query, and shortens its rows, but not a count.
    """
    sql = f"""
SELECT
    (SELECT least(count(), {ROWS}) FROM {name}) AS counted,
    (SELECT count() FROM (SELECT 1 FROM {name} LIMIT {ROWS})) AS sent
WHERE isNotNull(counted)
"""
    answer = client.query(f"{sql.strip()}\n{clause(settings)}").result_rows
    return len(answer) == 1 and answer[0][0] <= answer[0][1]
