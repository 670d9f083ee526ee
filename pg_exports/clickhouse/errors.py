"""What ClickHouse's refusals mean, for the person who reads them."""

import re
from collections.abc import Mapping

from clickhouse_connect.driver.exceptions import Error, ProgrammingError

from pg_exports.errors import PassingError, SourceError, shortened
from pg_exports.models import Query
from pg_exports.models.columns import TOLD_APART

# From ClickHouse's ErrorCodes.cpp: those that a later try may not meet.
PASSING_CODES = frozenset(
    {
        3,  # UNEXPECTED_END_OF_FILE
        32,  # ATTEMPT_TO_READ_AFTER_EOF
        95,  # CANNOT_READ_FROM_SOCKET
        96,  # CANNOT_WRITE_TO_SOCKET
        159,  # TIMEOUT_EXCEEDED
        198,  # DNS_ERROR: a shard's name, as of a pod that is being replaced
        202,  # TOO_MANY_SIMULTANEOUS_QUERIES
        203,  # NO_FREE_CONNECTION
        209,  # SOCKET_TIMEOUT
        210,  # NETWORK_ERROR
        216,  # QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING: the driver sent it once more itself when its connection broke
        225,  # NO_ZOOKEEPER
        236,  # ABORTED
        241,  # MEMORY_LIMIT_EXCEEDED
        254,  # NO_ACTIVE_REPLICAS
        265,  # NO_AVAILABLE_REPLICA
        279,  # ALL_CONNECTION_TRIES_FAILED
        289,  # REPLICA_IS_NOT_IN_QUORUM
        319,  # UNKNOWN_STATUS_OF_INSERT
        369,  # ALL_REPLICAS_ARE_STALE
        425,  # SYSTEM_ERROR
        439,  # CANNOT_SCHEDULE_TASK
        459,  # CANNOT_SET_THREAD_PRIORITY
        473,  # DEADLOCK_AVOIDED
        499,  # S3_ERROR
        519,  # NO_REMOTE_SHARD_AVAILABLE
        735,  # QUERY_WAS_CANCELLED_BY_CLIENT: a shard's word for its initiator's end
        745,  # SERVER_OVERLOADED
        749,  # TCP_CONNECTION_LIMIT_REACHED
        762,  # HTTP_CONNECTION_LIMIT_REACHED
        999,  # KEEPER_EXCEPTION
    }
)

CANCELLED = 394
"""QUERY_WAS_CANCELLED."""

THROWN = 395
"""FUNCTION_THROW_IF_VALUE_IS_NON_ZERO."""

_TRACE = "The query is in system.query_log, with the run's id in its log_comment."

_VALUE = (
    "A value does not fit its column's type: change the type, the expression or your own query in the export's YAML."
)

_NO_SHARD = (
    "A shard has no replica that is found and answers: see system.clusters on the server that was asked. No shard is ever "
    "skipped, as its rows would be missing."
)

_REMEDIES = {
    6: _VALUE,
    41: _VALUE,
    43: "In an added column's expression, `e.properties` is the column as ClickHouse has it; `properties` may be NULL.",
    47: "A column is missing: the models read PostHog's tables as PostHog makes them. A query of your own must give each of "
    "its `columns`.",
    62: "Check the SQL of a query of your own, and of added columns.",
    60: "A source table is missing: check the connection's `database` (CLICKHOUSE_DATABASE).",
    70: _VALUE,
    81: "Check the connection's `database` (CLICKHOUSE_DATABASE).",
    115: "Check the connection's `settings`.",
    159: "The query reached `max_execution_time`, of the user's profile or the connection's `settings`.",
    164: "The user's profile has `readonly` = 1, which forbids the settings that every query carries. An administrator of "
    "ClickHouse can allow them: ALTER USER <user> SETTINGS readonly = 2. The user can still change no data.",
    192: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    193: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    194: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    198: _NO_SHARD,
    225: "With `select_sequential_consistency` a replica asks ClickHouse Keeper (ZooKeeper), which it has lost.",
    241: "The query reached a limit of memory: `max_memory_usage` or `max_memory_usage_for_user` of the profile, or the "
    "server's own. A shorter interval takes less, and so does `max_threads` in the connection's `settings`.",
    279: _NO_SHARD,
    288: "In a query of your own, and in an added column's expression, write GLOBAL IN and GLOBAL JOIN before what reads a "
    "Distributed table, or leave `distributed_product_mode` out of the connection's `settings`.",
    289: "`select_sequential_consistency` reads only replicas that have all that was written with `insert_quorum`: this one "
    "has not yet.",
    369: "A shard has no replica that answers and has all rows: they are out of reach (system.clusters on the server that was "
    "asked), behind, or without ClickHouse Keeper (absolute_delay and is_readonly in system.replicas). By how many seconds "
    "one may be behind says `max_replica_delay_for_distributed_queries` in the connection's `settings`.",
    394: "The query was cancelled in ClickHouse, as by an administrator's KILL QUERY: it is not started again by itself. When "
    "it may run, run the interval again.",
    THROWN: _VALUE,
    427: "A pattern in the export's `filters` is no regular expression (RE2's syntax).",
    452: "A constraint of the user's profile forbids a setting that every query carries (docs/clickhouse.md lists them). An "
    "administrator of ClickHouse can allow it: take the setting named above out of the CONSTRAINTS of the profile, or give it "
    "the value that docs/clickhouse.md has.",
    467: _VALUE,
    396: "The user's profile limits the answer: `max_result_rows` or `max_result_bytes`.",
    497: "An administrator of ClickHouse can give the user what it lacks: GRANT SELECT, SHOW DICTIONARIES, dictGet ON "
    "<database>.* TO <user>.",
    1000: "A value of the export's filters or event names is longer than the 128 KB that ClickHouse takes "
    "(`http_max_field_value_size`).",
    507: "Leave `force_optimize_skip_unused_shards` out of the connection's `settings`.",
    516: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    519: _NO_SHARD,
    701: "A Distributed table's cluster is not among the `remote_servers` of the server that was asked.",
}

_NAME = r"(?:`(?:[^`\\]|\\.)*`|[\w*]+)"
_LIMITS = {
    36: ("Query tree is too big", "max_expanded_ast_elements"),
    161: ("", "max_columns_to_read"),
    162: ("", "max_subquery_depth"),
    165: ("", "max_temporary_columns"),
    166: ("", "max_temporary_non_const_columns"),
    167: ("", "max_ast_depth"),
    168: ("", "max_ast_elements"),
    202: ("", "max_concurrent_queries_for_user` or `max_concurrent_queries_for_all_users"),
    572: ("", "query_plan_max_optimizations_to_apply"),
}
"""Limits that ClickHouse does not name: by code, a part of its text and the setting."""

_SIZE = re.compile(r"Limit for (?P<what>.+?) exceeded(?:, max (?P<unit>rows|bytes))?")
_SIZES = {
    "rows or bytes to read": "max_{}_to_read",
    "rows or bytes to read on leaf node": "max_{}_to_read_leaf",
    "rows to GROUP BY": "max_rows_to_group_by",
    "IN-set": "max_{}_in_set",
    "DISTINCT": "max_{}_in_distinct",
    "JOIN": "max_{}_in_join",
    "ORDER BY": "max_{}_to_sort",
    "IN/JOIN external table": "max_{}_to_transfer",
}
"""The same, by what ClickHouse calls it; {} is rows or bytes."""

_LACKING_GRANT = re.compile(
    r"DB::Exception: (?P<user>\S+): Not enough privileges.*?necessary to have the grant "
    rf"(?P<grant>[A-Za-z ]+(?:\([^)]*\))? ON {_NAME}(?:\.{_NAME})?)",
    re.DOTALL,
)

_NOT_BY_A_PROFILE = {60, 81, 115, 164, 192, 193, 194, 394, 452, 497, 516, 701}
"""Errors that no setting of a profile leads to, or whose text names it."""

SETTINGS_SHOWN = 30

_OF_A_SHARD = re.compile(r"Received from (\S+?)[,.]? ")
_BY_A_SHARD = {60, 81, 192, 193, 194, 497, 516}
"""Where a shard says so, it is not about the connection's own `database`, `user` and grants."""


def explained(
    error: Error,
    address: str,
    changed: Mapping[str, str] | None = None,
    own: Mapping[str, object] | None = None,
    query: Query | None = None,
) -> SourceError | PassingError:
    """The error to raise for one of clickhouse-connect: with an address, ClickHouse's own words and a remedy.

    Args:
        error: it.
        address: of the server.
        changed: the settings of the user's profile, which may be the cause.
        own: those of the connection, likewise.
        query: what was asked. What it does not say itself is not quoted in an error that may be about a row.
    """
    text = str(error)
    if error.code is None and isinstance(error, ProgrammingError):
        return SourceError(f"The query for ClickHouse at {address} cannot be sent: {text}")
    if error.code is None:
        return _no_answer(text, address)
    return refused(text, error.code, address, changed, own, query)


def refused(
    text: str,
    code: int | None,
    address: str,
    changed: Mapping[str, str] | None = None,
    own: Mapping[str, object] | None = None,
    query: Query | None = None,
) -> SourceError | PassingError:
    """The error to raise for one of ClickHouse's exceptions, before the first row or in mid-stream. See `explained`."""
    text = shortened(text)
    words, quotes_a_row = _own_words(text, code, query)
    lines = [f"ClickHouse at {address} answered with an error: {words}", _remedy(text, code or 0)]
    if quotes_a_row:
        lines.append("The value is quoted in ClickHouse alone: column `exception` of system.query_log.")
    if code in PASSING_CODES:
        return PassingError("\n".join(filter(None, lines)))
    is_explained = code in _NOT_BY_A_PROFILE or _limit(text, code or 0)
    if not is_explained:
        lines += [_suspects("the user's profile", changed), _suspects("the connection's `settings`", own)]
    return SourceError("\n".join(line for line in [*lines, None if any(lines[1:]) else _TRACE] if line))


def may_be_a_shutdown(error: SourceError | PassingError) -> bool:
    """Whether ClickHouse has cancelled the query: it does so on KILL QUERY, and when it shuts down."""
    return isinstance(error, SourceError) and f"Code: {CANCELLED}." in str(error)


def _remedy(text: str, code: int) -> str | None:
    shard = _OF_A_SHARD.search(text)
    if shard and code in _BY_A_SHARD:
        return (
            f"The shard {shard[1]} says so: look there. It is asked as the user that the cluster's definition names, or as "
            "the connection's own where that has a `secret`, who needs SELECT on the local tables."
        )
    lacking = _LACKING_GRANT.search(text)
    if lacking:
        return (
            "An administrator of ClickHouse can allow it: "
            f"GRANT {lacking['grant']} TO {lacking['user']}; README lists all grants that an export needs."
        )
    setting = _limit(text, code)
    if setting and shard:
        return (
            f"The query reached `{setting}` on the shard {shard[1]}: see the profile of the user as whom it is asked, that of "
            "the connection's user, and the connection's `settings`."
        )
    if setting:
        return f"The query reached `{setting}`, of the user's profile or the connection's `settings`."
    return _REMEDIES.get(code)


def _limit(text: str, code: int) -> str | None:
    """The setting of a limit that the query reached and ClickHouse does not name."""
    size = _SIZE.search(text)
    if size and size["what"] in _SIZES:
        return _SIZES[size["what"]].format(size["unit"] or "rows")
    part, setting = _LIMITS.get(code, ("", None))
    return setting if part in text else None


def _suspects(where: str, settings: Mapping[str, object] | None) -> str | None:
    """One line with the settings that may be the cause."""
    if not settings:
        return None
    shown = [f"{name} = {value if str(value) else repr(value)}" for name, value in sorted(settings.items())]
    more = f", and {len(shown) - SETTINGS_SHOWN} more" if len(shown) > SETTINGS_SHOWN else ""
    return f"Settings of {where} that may be the cause: {', '.join(shown[:SETTINGS_SHOWN])}{more}."


# The text is a query's own, which makes ClickHouse read it as a number: see `exact_value`.
_OF_A_KEY = re.compile(
    rf"Cannot parse string '(Column [^\n]*?, {TOLD_APART},.*?)' as UInt8: .*?(?=\([A-Z_]+\))", re.DOTALL
)


# A function that meets a value which it cannot take quotes it, whatever the error's code; then come its name and arguments,
# which may be constants that were read from a table.
_OF_A_VALUE = re.compile(
    r"(DB::Exception: )(?!Received from).*(: while executing 'FUNCTION )(\w*)([^\n]*')(?=[^']*\Z)", re.DOTALL
)

_QUOTES_NO_ROW = (
    PASSING_CODES
    | _NOT_BY_A_PROFILE
    # What is written in the query: a syntax, a function, a column; throwIf's words are a constant of it.
    | {46, 47, 62, THROWN}
    # Limits, whose settings are quoted.
    | {158, 160, 161, 162, 165, 166, 167, 168, 191, 307, 396, 572}
)

# What a boolean might be, a setting, and the aliases of tables.
_ITS_OWN = {"true", "false", "implicit_transaction", *(f"__table{number}" for number in range(1, 20))}

_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)


def _own_words(text: str, code: int | None, query: Query | None) -> tuple[str, bool]:
    """ClickHouse's exception without what clickhouse-connect puts around it, and without what it quotes of a row; and whether
    it did.
    """
    found = re.search(r"Code: \d+\. DB::.*", text, re.DOTALL)
    own = re.sub(r"\s*\(for url [^)]*\)\s*\Z", "", found.group() if found else text)
    # The query that it repeats may have two thousand characters.
    short = re.sub(
        r"\.? In (?:scope|query) .*(?=\. \([A-Z_]+\))", "", _OF_A_KEY.sub(r"\1 ", own), flags=re.DOTALL
    ).strip()
    if code in _QUOTES_NO_ROW or _OF_A_KEY.search(own):
        return short, False
    of_a_value = _OF_A_VALUE.search(short)
    if of_a_value:
        arguments = of_a_value[4] if "'" not in of_a_value[4][:-1] else "(...)'"
        said = f"{of_a_value[1]}a value that the function cannot take{of_a_value[2]}{of_a_value[3]}{arguments}"
        return short[: of_a_value.start()] + said + short[of_a_value.end() :], True
    asked = " ".join([query.sql, *map(str, query.parameters.values())]) if query else ""
    quoted = " ".join(_QUOTED.findall(re.sub(r"\bsetting '\w+'", "", short)))
    if short.count("'") % 2 == 0 and _words(quoted) <= _words(asked) | _ITS_OWN:
        return short, False
    # From the first quote to the last: a value may have quotes in it.
    first, last = short.index("'"), short.rindex("'")
    return f"{short[:first]}'...'{short[last + 1 :]}", True


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _no_answer(text: str, address: str) -> SourceError | PassingError:
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return SourceError(
            f"The certificate of ClickHouse at {address} could not be verified: {text}\nSet `ca_certificate` "
            "(CLICKHOUSE_CA_CERTIFICATE) to the file of the authority that signed it, and `host` to a name in it."
        )
    if re.search(r"HTTP status 3\d\d", text):
        return SourceError(
            f"ClickHouse at {address} answers with a redirect, which is not followed: the password goes to `host` alone. "
            "Set `host`, `port` and `secure` (CLICKHOUSE_HOST, CLICKHOUSE_PORT, CLICKHOUSE_SECURE) to ClickHouse's own."
        )
    if "SSL" in text:
        return SourceError(
            f"ClickHouse at {address} does not speak TLS on this port: {text}\nCheck `port` and `secure` "
            "(CLICKHOUSE_PORT, CLICKHOUSE_SECURE)."
        )
    return PassingError(
        f"ClickHouse at {address} does not answer: {text}\nIs it running, and are `host`, `port` and `secure` "
        "(CLICKHOUSE_HOST, CLICKHOUSE_PORT, CLICKHOUSE_SECURE) right?"
    )
