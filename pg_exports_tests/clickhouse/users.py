"""Users of the tests' ClickHouse beside `exporter`: with the README's grants or fewer, and with other profiles."""

from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants

SOURCE_DATABASES = ("posthog", "test_*", "bench_*")
"""The ClickHouse databases that exports may read: those of tests and of the bench have names that begin so."""

PASSWORD = "of the tests"
"""Of each."""

_GRANTS = export_grants(*SOURCE_DATABASES)


def _user(name: str, settings: dict[str, object] | None = None, **more: object) -> ClickHouseUser:
    return ClickHouseUser(name, PASSWORD, _GRANTS, settings or {}, **more)  # type: ignore[arg-type]  # mixed kinds


SHORTENED = (
    _user("limit_10", {"limit": 10}),
    _user("limit_1000", {"limit": 1000}),
    _user("offset_5", {"offset": 5}),
    _user("result_1000", {"max_result_rows": 1000, "result_overflow_mode": "break"}),
    _user("result_20000_bytes", {"max_result_bytes": 20_000, "result_overflow_mode": "break"}),
    _user("read_1000", {"max_rows_to_read": 1000, "read_overflow_mode": "break"}),
    _user("read_1000_leaf", {"max_rows_to_read_leaf": 1000, "read_overflow_mode_leaf": "break"}),
    _user("a_twentieth_of_a_second", {"max_execution_time": 0.05, "timeout_overflow_mode": "break"}),
    _user("group_by_10", {"max_rows_to_group_by": 10, "group_by_overflow_mode": "any"}),
    _user("distinct_10", {"max_rows_in_distinct": 10, "distinct_overflow_mode": "break"}),
    _user("set_10", {"max_rows_in_set": 10, "set_overflow_mode": "break"}),
    _user("sort_10", {"max_rows_to_sort": 10, "sort_overflow_mode": "break"}),
    _user("join_10", {"max_rows_in_join": 10, "join_overflow_mode": "break"}),
    _user("transfer_10", {"max_rows_to_transfer": 10, "transfer_overflow_mode": "break"}),
    _user("filtered", {"additional_result_filter": "1 = 0"}),
    _user("no_rows", {"filter": "1 = 0"}),
    _user("no_format", {"output_format": "Null"}),
    _user("twice", {"select": "* REPLACE (arrayJoin([team_id, team_id]) AS team_id)"}),
    _user(
        "everything_wrong",
        {"limit": 10, "offset": 5, "use_query_cache": 1, "join_use_nulls": 1, "transform_null_in": 1},
    ),
)
"""With them a server would end a shortened answer like a whole one, or give rows twice."""

READONLY_1 = _user("readonly_1", {"readonly": 1})
READONLY_2 = _user("readonly_2", {"readonly": 2})
CONSTRAINED = _user(
    "constrained", constraints={"join_overflow_mode": "<readonly/>"}, settings={"join_overflow_mode": "break"}
)
LITTLE_MEMORY = _user("little_memory", {"max_memory_usage": 30_000_000})
LITTLE_TIME = _user("little_time", {"max_execution_time": 1})
FEW_QUERIES = _user("few_queries", queries_an_hour=1)
WITHOUT_DICTIONARIES = ClickHouseUser(
    "without_dictionaries", PASSWORD, tuple(f"GRANT SELECT ON {database}.*" for database in SOURCE_DATABASES)
)
EVENTS_ONLY = ClickHouseUser("events_only", PASSWORD, ("GRANT SELECT(uuid, event) ON posthog.events",))
FILTERED_BY_A_COLUMN = _user("filtered_by_a_column", {"filter": "event != 'x'"})
PROGRESS = _user("progress", {"send_progress_in_http_headers": 1, "http_headers_progress_interval_ms": 100})

USERS = (
    *SHORTENED,
    READONLY_1,
    READONLY_2,
    CONSTRAINED,
    LITTLE_MEMORY,
    LITTLE_TIME,
    FEW_QUERIES,
    WITHOUT_DICTIONARIES,
    EVENTS_ONLY,
    FILTERED_BY_A_COLUMN,
    PROGRESS,
)
"""All of them."""
