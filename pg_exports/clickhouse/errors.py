"""What ClickHouse's refusals mean, for the person who reads them."""

import re

from clickhouse_connect.driver.exceptions import Error, ProgrammingError

from pg_exports.errors import PassingError, SourceError

# From ClickHouse's ErrorCodes.cpp: those that a later try may not meet.
PASSING_CODES = frozenset(
    {
        3,  # UNEXPECTED_END_OF_FILE
        32,  # ATTEMPT_TO_READ_AFTER_EOF
        159,  # TIMEOUT_EXCEEDED
        202,  # TOO_MANY_SIMULTANEOUS_QUERIES
        203,  # NO_FREE_CONNECTION
        209,  # SOCKET_TIMEOUT
        210,  # NETWORK_ERROR
        236,  # ABORTED
        241,  # MEMORY_LIMIT_EXCEEDED
        279,  # ALL_CONNECTION_TRIES_FAILED
        289,  # REPLICA_IS_NOT_IN_QUORUM
        319,  # UNKNOWN_STATUS_OF_INSERT
        369,  # ALL_REPLICAS_ARE_STALE
        394,  # QUERY_WAS_CANCELLED
        425,  # SYSTEM_ERROR
        439,  # CANNOT_SCHEDULE_TASK
        459,  # CANNOT_SET_THREAD_PRIORITY
        473,  # DEADLOCK_AVOIDED
        499,  # S3_ERROR
        745,  # SERVER_OVERLOADED
        999,  # KEEPER_EXCEPTION
    }
)

_TRACE = "The query is in system.query_log, with the run's id in its log_comment."

_VALUE = (
    "A value does not fit its column's type: change the type, the expression or your own query in the export's YAML."
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
    164: "The ClickHouse user may not change settings: give it a profile with `readonly` 2 instead of 1.",
    192: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    193: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    194: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
    395: _VALUE,
    427: "A pattern in the export's `filters` is no regular expression (RE2's syntax).",
    467: _VALUE,
    497: "The ClickHouse user needs SELECT on the model's source tables: `GRANT SELECT ON <database>.* TO <user>`.",
    516: "Check `user` and `password` (CLICKHOUSE_USER, CLICKHOUSE_PASSWORD).",
}


def explained(error: Error, address: str) -> SourceError | PassingError:
    """The error to raise for one of clickhouse-connect: with an address, ClickHouse's own words and a remedy."""
    text = str(error)
    if error.code is None and isinstance(error, ProgrammingError):
        return SourceError(
            f"The query for ClickHouse at {address} cannot be sent: {text}\nCheck the connection's `settings`."
        )
    if error.code is None:
        return _no_answer(text, address)
    return refused(text, error.code, address)


def refused(text: str, code: int | None, address: str) -> SourceError | PassingError:
    """The error to raise for one of ClickHouse's exceptions, before the first row or in mid-stream."""
    said = f"ClickHouse at {address} answered with an error: {_own_words(text)}"
    if code in PASSING_CODES:
        return PassingError(said)
    return SourceError(f"{said}\n{_REMEDIES.get(code or 0, _TRACE)}")


def _own_words(text: str) -> str:
    """ClickHouse's exception without what clickhouse-connect puts around it."""
    found = re.search(r"Code: \d+\. DB::.*", text, re.DOTALL)
    own = re.sub(r"\s*\(for url [^)]*\)\s*\Z", "", found.group() if found else text)
    # The query that it repeats may have two thousand characters.
    return re.sub(r" In scope .*(?=\. \([A-Z_]+\))", "", own, flags=re.DOTALL).strip()


def _no_answer(text: str, address: str) -> SourceError | PassingError:
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return SourceError(
            f"The certificate of ClickHouse at {address} could not be verified: {text}\nSet `ca_certificate` "
            "(CLICKHOUSE_CA_CERTIFICATE) to the file of the authority that signed it, and `host` to a name in it."
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
