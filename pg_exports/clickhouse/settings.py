"""The ClickHouse settings that every query carries, so that nobody's profile decides which rows it gives or what is in them.

They travel in the query's own SETTINGS clause. There they also reach the shards of a Distributed table, even those that are
equal to what the asked server has. `docs/clickhouse.md` has the same table for users; a test compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pg_exports.models.model import backquoted, quoted

Value = int | float | str | bool | Mapping[str, str]

REPLICA_DELAY = 60
"""Seconds that a replica may be behind. A schedule's run begins a minute after its interval's end, so what is behind by less
has all of the interval. ClickHouse's own default is 300."""

WHOLE: Mapping[str, Value] = {
    "limit": 0,
    "offset": 0,
    **{
        f"{what}_overflow_mode": "throw"
        for what in ("distinct", "group_by", "join", "read", "result", "set", "sort", "timeout", "transfer")
    },
    "read_overflow_mode_leaf": "throw",
    "timeout_overflow_mode_leaf": "throw",
    "skip_unavailable_shards": 0,
    "distributed_group_by_no_merge": 0,
    "use_query_cache": 0,
    "additional_result_filter": "",
    "additional_table_filters": {},
    "output_format_arrow_string_as_string": 1,
}
"""With other values a server ends a shortened answer like a whole one, or has rows twice."""

HTTP: Mapping[str, str] = {
    # As long as a query works, each of these headers would be a byte that is read, and no read would time out.
    "send_progress_in_http_headers": "0",
    # A run that ends hangs up: nobody reads the rest.
    "cancel_http_readonly_queries_on_client_close": "1",
    "enable_http_compression": "0",
    "dialect": "clickhouse",
}
"""What the server must know before it reads the query: sent with the request."""

OF_CLUSTERS: Mapping[str, Value] = {
    # A subquery of the user's own over a Distributed table is read once, for all shards: `local` reads a shard's part of it.
    "distributed_product_mode": "global",
    # True only of rows that came through the Distributed table, and not of those that consumers wrote to the shards.
    "optimize_skip_unused_shards": 0,
    # Of tables with a sampling key each replica would read a share, and a share of all there is only where none is behind.
    "max_parallel_replicas": 1,
    "max_replica_delay_for_distributed_queries": REPLICA_DELAY,
    "fallback_to_stale_replicas_for_distributed_queries": 0,
}
"""Settings for Distributed tables under which answers are right however the rows lie. A connection's `settings` win over
them, as who knows the cluster may know better."""

PINNED: Mapping[str, Value] = {**WHOLE}
"""What nothing wins over."""


@dataclass(frozen=True)
class ServerSettings:
    """What `system.settings` of a server says to a user.

    Attributes:
        known: the settings that it has.
        changed: those that the user's profile, or the server's, sets to another value than ClickHouse's default.
        distributed: one of the database's Distributed tables for each cluster that they are on.
    """

    known: frozenset[str]
    changed: Mapping[str, str]
    distributed: tuple[str, ...] = ()


# One row, as a profile may limit a result's rows.
_QUERY = """
SELECT
    groupArray(name),
    groupArrayIf((name, value), changed),
    (
        SELECT groupArray(name)
        FROM (
            SELECT any(name) AS name
            FROM system.tables
            WHERE database = currentDatabase() AND engine = 'Distributed'
            GROUP BY extract(engine_full, '^Distributed\\(([^,]+),')
        )
    )
FROM system.settings
"""

ROWS_OF_A_SHARD = 1_000_000
"""Rows that `shards_query` has a cluster of one shard send at most."""


def shards_query(table: str) -> str:
    """A query that tells whether the users as whom the shards of a Distributed table are asked have `limit` or `offset` in
    their profiles, which ClickHouse does not let the asking server undo: its answer is no row or two numbers that differ, or
    there is an error (`errors.COLUMN_OF_A_SHARD`).

    Where there are several shards, a shard that wraps its query into a limited one names a count's column in another way. A
    single one is given the whole query, and shortens its rows, but not a count.
    """
    name = backquoted(table)
    return f"""
SELECT
    (SELECT least(count(), {ROWS_OF_A_SHARD}) FROM {name}) AS counted,
    (SELECT count() FROM (SELECT 1 FROM {name} LIMIT {ROWS_OF_A_SHARD})) AS sent
WHERE isNotNull(counted)
"""


def discovery() -> str:
    """The query for `ServerSettings`: one row with three arrays. It has no setting that a supported server does not know."""
    return f"{_QUERY.strip()}\n{clause(WHOLE)}"


def discovered(names: Sequence[str], changed: Sequence[tuple[str, str]], distributed: Sequence[str]) -> ServerSettings:
    """The answer to `discovery`."""
    ours = {*WHOLE, *HTTP}
    by_others = {name: value for name, value in changed if name not in ours}
    return ServerSettings(frozenset(names), by_others, tuple(distributed))


def of_query(own: Mapping[str, Value], server: ServerSettings, log_comment: str) -> dict[str, Value]:
    """The settings of one query.

    Args:
        own: the connection's.
        server: what it has: a setting that it does not know has nothing to undo either, and would be refused.
        log_comment: what the query log keeps beside the query.
    """
    defaults = {name: value for name, value in OF_CLUSTERS.items() if name in server.known}
    pinned = {name: value for name, value in PINNED.items() if name in server.known}
    return {**defaults, **own, **pinned, "log_comment": log_comment}


def clause(settings: Mapping[str, Value]) -> str:
    """The SETTINGS clause."""
    return "SETTINGS " + ", ".join(f"{backquoted(name)} = {_literal(value)}" for name, value in settings.items())


def _literal(value: Value) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(str(key))}: {quoted(str(item))}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, int) else quoted(str(value))
