"""The ClickHouse settings that every query carries, so that nobody's profile decides which rows it gives or what is in them.

They travel in the query's own SETTINGS clause. There they also reach the shards of a Distributed table, even those that are
equal to what the asked server has. `docs/clickhouse.md` has the same table for users; a test compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pg_exports.clickhouse.distributed import SourceTable
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
    "empty_result_for_aggregation_by_empty_set": 0,
    "use_query_cache": 0,
    "additional_result_filter": "",
    "additional_table_filters": {},
}
"""With other values a server ends a shortened answer like a whole one, or has rows twice."""

LATER: Mapping[str, Value] = {
    "filter": "",
    "select": "",
    "order": "",
    "sort": "",
    "page": 0,
    "format": "",
    "output_format": "",
    "framing_output_format": "None",
}
"""Of the same kind, in later versions than the oldest that is supported: what is put around a query or before its answer."""

NATIVE: Mapping[str, Value] = {
    "output_format_native_encode_types_in_binary_format": 0,
    "input_format_native_decode_types_in_binary_format": 0,
}
"""Of small answers, and of those of shards, which travel in ClickHouse's native format."""

ROWS: Mapping[str, Value] = {
    "final": 0,
    "do_not_merge_across_partitions_select_final": 0,
    "apply_deleted_mask": 1,
    "apply_patch_parts": 1,
    "apply_mutations_on_fly": 0,
    "apply_prewhere_after_final": 0,
    "defer_partition_pruning_after_final": 1,
    "use_skip_indexes_if_final_exact_mode": 1,
}
"""Which of a table's stored rows count."""

MEANING: Mapping[str, Value] = {
    "compatibility": "",
    "session_timezone": "",
    "join_use_nulls": 0,
    "join_default_strictness": "ALL",
    "any_join_distinct_right_table_keys": 0,
    "join_any_take_last_row": 0,
    "single_join_prefer_left_table": 1,
    "transform_null_in": 0,
    "group_by_use_nulls": 0,
    "force_grouping_standard_compatibility": 1,
    "aggregate_functions_null_for_empty": 0,
    "count_distinct_implementation": "uniqExact",
    "union_default_mode": "",
    "intersect_default_mode": "ALL",
    "except_default_mode": "ALL",
    "prefer_column_name_to_alias": 0,
    "enable_positional_arguments": 1,
    "enable_global_with_statement": 1,
    "asterisk_include_alias_columns": 0,
    "asterisk_include_materialized_columns": 0,
    "asterisk_include_virtual_columns": 0,
    "enable_named_columns_in_function_tuple": 0,
    "legacy_column_name_of_tuple_literal": 0,
    "least_greatest_legacy_null_behavior": 0,
    "cast_keep_nullable": 0,
    "cast_ipv4_ipv6_default_on_conversion_error": 0,
    "decimal_check_overflow": 1,
    "function_json_value_return_type_allow_complex": 0,
    "function_json_value_return_type_allow_nullable": 0,
    "splitby_max_substrings_includes_remaining_string": 0,
    "enable_extended_results_for_datetime_functions": 0,
    "use_legacy_to_time": 0,
    "date_time_overflow_behavior": "ignore",
    "geotoh3_argument_order": "lat_lon",
    "h3togeo_lon_lat_result_order": 0,
    "rewrite_in_to_join": 0,
}
"""What the words of a query mean."""

TEXTS: Mapping[str, Value] = {
    "date_time_input_format": "best_effort",
    "cast_string_to_date_time_mode": "best_effort",
    "cast_string_to_dynamic_use_inference": 0,
    "cast_string_to_variant_use_inference": 1,
    "precise_float_parsing": 1,
    "allow_simdjson": 1,
    "input_format_json_infer_array_of_dynamic_from_array_of_different_types": 1,
    "input_format_json_try_infer_numbers_from_strings": 0,
    "input_format_read_datetime_number_as_raw_value": 0,
    "input_format_try_infer_dates": 1,
    "input_format_try_infer_datetimes": 1,
    "input_format_try_infer_datetimes_only_datetime64": 0,
    "type_json_skip_duplicated_paths": 0,
    "parsedatetime_parse_without_leading_zeros": 1,
    "parsedatetime_e_requires_space_padding": 0,
    "date_time_output_format": "simple",
    "date_time_64_output_format_cut_trailing_zeros_align_to_groups_of_thousands": 0,
    "interval_output_format": "numeric",
    "bool_true_representation": "true",
    "bool_false_representation": "false",
    "formatdatetime_e_with_space_padding": 0,
    "formatdatetime_f_prints_scale_number_of_digits": 0,
    "formatdatetime_f_prints_single_zero": 0,
    "formatdatetime_format_without_leading_zeros": 0,
    "formatdatetime_parsedatetime_m_is_month_name": 1,
    "output_format_always_write_decimal_point_in_float_and_decimal": 0,
    "output_format_decimal_trailing_zeros": 0,
    "output_format_float_precision": 0,
    "output_format_values_escape_quote_with_quote": 0,
    "output_format_csv_crlf_end_of_line": 0,
    "output_format_tsv_crlf_end_of_line": 0,
    "format_csv_delimiter": ",",
    "format_csv_null_representation": "\\N",
    "format_tsv_null_representation": "\\N",
    "json_type_escape_dots_in_keys": 0,
    "output_format_json_escape_forward_slashes": 1,
    "output_format_json_map_as_array_of_tuples": 0,
    "output_format_json_named_tuples_as_objects": 1,
    "output_format_json_quote_64bit_floats": 0,
    "output_format_json_quote_64bit_integers": 0,
    "output_format_json_quote_decimals": 0,
    "output_format_json_quote_denormals": 0,
    "output_format_json_skip_null_value_in_named_tuples": 0,
    "output_format_json_validate_utf8": 0,
}
"""How values become texts and JSON, and texts become values. Identities of own models are made of texts."""

WIRE: Mapping[str, Value] = {
    **NATIVE,
    "make_distributed_plan": 0,
    "optimize_const_name_size": 256,
    "output_format_arrow_string_as_string": 1,
    "output_format_arrow_fixed_string_as_fixed_byte_array": 1,
    "output_format_arrow_low_cardinality_as_dictionary": 0,
    "output_format_arrow_date_as_uint16": 0,
    "output_format_arrow_unsupported_types_as_binary": 1,
}
"""In which types an answer travels, and under which names of columns that of a shard."""

HTTP: Mapping[str, str] = {
    # As long as a query works, each of these headers would be a byte that is read, and no read would time out.
    "send_progress_in_http_headers": "0",
    # A run that ends hangs up: nobody reads the rest.
    "cancel_http_readonly_queries_on_client_close": "1",
    "enable_http_compression": "0",
    "dialect": "clickhouse",
    # Before the clause is read: a filter with thousands of values, or a long query of the user's own, is one query.
    "max_query_size": str(16 * 1024 * 1024),
}
"""What the server must know before it reads the query: sent with the request."""

OF_CLUSTERS: Mapping[str, Value] = {
    # A subquery of the user's own over a Distributed table is read once, for all shards: `local` reads a shard's part of it.
    "distributed_product_mode": "global",
    # True only of rows that came through the Distributed table, and not of those that consumers wrote to the shards.
    "optimize_skip_unused_shards": 0,
    # Of tables with a sampling key each replica would read a share, and a share of all there is only where none is behind.
    "max_parallel_replicas": 1,
    "parallel_replicas_mode": "read_tasks",
    "parallel_replicas_custom_key": "",
    "max_replica_delay_for_distributed_queries": REPLICA_DELAY,
    "fallback_to_stale_replicas_for_distributed_queries": 0,
}
"""Settings for Distributed tables under which answers are right however the rows lie. A connection's `settings` win over
them, as who knows the cluster may know better."""

PINNED: Mapping[str, Value] = {**WHOLE, **LATER, **ROWS, **MEANING, **TEXTS, **WIRE}
"""What nothing wins over."""


@dataclass(frozen=True)
class ServerSettings:
    """What the system tables of a server say to a user.

    Attributes:
        known: the settings that it has.
        changed: those that the user's profile, or the server's, sets to another value than ClickHouse's default.
        tables: the Distributed tables that the user may see, and those that may read them.
    """

    known: frozenset[str]
    changed: Mapping[str, str]
    tables: tuple[SourceTable, ...] = ()


# One row, as a profile may limit a result's rows, and no IN, as it may limit the size of sets.
_QUERY = """
SELECT
    groupArray(name),
    groupArrayIf((name, value), changed),
    (
        SELECT groupArray((database, name, if(engine = 'Distributed', '', create_table_query)))
        FROM system.tables
        WHERE indexOf(
            ['Distributed', 'View', 'MaterializedView', 'WindowView', 'Merge', 'Buffer', 'Alias'], engine
        ) > 0
    )
FROM system.settings
"""


def discovery(*, of_later_versions: bool = False) -> str:
    """The query for `ServerSettings`: one row with three arrays. Every supported server knows its settings, but for those of
    later versions.
    """
    settings = {**WHOLE, **NATIVE, **(LATER if of_later_versions else {})}
    return f"{_QUERY.strip()}\n{clause(settings)}"


def discovered(
    names: Sequence[str], changed: Sequence[tuple[str, str]], tables: Sequence[tuple[str, str, str]]
) -> ServerSettings:
    """The answer to `discovery`."""
    ours = {*PINNED, *HTTP}
    by_others = {name: value for name, value in changed if name not in ours}
    return ServerSettings(frozenset(names), by_others, tuple(SourceTable(*table) for table in tables))


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
