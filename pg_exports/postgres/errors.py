"""What Postgres's refusals mean, for the person who reads them. No message here ever holds a password."""

import re

from adbc_driver_manager import AdbcStatusCode
from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres import messages
from pg_exports.postgres.identifiers import quoted
from pg_exports.postgres.watchdog import ANSWER_BYTES

# Classes and codes of Postgres's "Appendix A" that a later try may not meet. All others are about the statement, a privilege
# or a value: another try meets them again.
PASSING_SQLSTATES = (
    "08",  # connection exceptions; a pooler's refusals, too
    "25P03",  # idle in transaction timeout
    "25P04",  # transaction timeout
    "26000",  # invalid statement name: a pooler gave a statement's messages to two servers
    "40",  # transaction rollback: deadlock, serialization
    "53",  # insufficient resources: disk, memory, connections
    "55006",  # object in use
    "55P03",  # lock_not_available
    "57P",  # operator intervention: shutdown, cannot connect now
    "58",  # system and I/O errors; PgCat's refusals
    "XX000",  # internal error: races in the catalog ("tuple concurrently updated"); Supavisor's and Neon's refusals
)

READ_ONLY = "25006"
"""read_only_sql_transaction. Servers change roles in a failover, so it may pass."""

_QUERY_CANCELED = "57014"
_LOCK_NOT_AVAILABLE = "55P03"

# The driver, which looks for the names of types without quotes.
_UNKNOWN_TYPES = "Postgres type with oid 0 not found"

_UNKNOWN_TYPES_REMEDY = (
    "quote_all_identifiers is on for this role, database or server, and the Postgres driver cannot read the types' names "
    "then. Run as a superuser: ALTER ROLE ... SET quote_all_identifiers = off;"
)

# A table, function or type that is not found, within a function: a trigger's, a generated column's, a constraint's.
_NOT_FOUND = ("42P01", "42883", "42704", "3F000")

_SEARCH_PATH_REMEDY = (
    "A function that the table calls names something without its schema, and exports look names up in pg_catalog alone. Write "
    "the schema before the name, or run as the function's owner: ALTER FUNCTION ... SET search_path = <schema>, pg_temp;"
)

_STANDBY_REMEDY = (
    "The server is a read-only standby, or was made read-only. If that does not pass by itself, set `host` "
    "(POSTGRES_HOST) to the primary."
)

# What is known to stay as it is until somebody changes it, and what to change. A failed connection has no SQLSTATE, only
# the words of Postgres, of libpq or of a pooler.
_PERMANENT_CONNECTS = (
    (
        # SASL: PgBouncer. The password that was provided: RDS Proxy. IAM: RDS Proxy, Cloud SQL.
        r"(password|SASL) authentication failed|The password that was provided|IAM (user )?authentication failed for",
        "Check the connection's `user` and `password` (for `postgres`: POSTGRES_USER, POSTGRES_PASSWORD).",
    ),
    (
        "no password supplied",
        "Set `password` (POSTGRES_PASSWORD).",
    ),
    (
        r'(database|role) ".*" does not exist|no such (database|user)|No pool configured for database',
        "Check `database` (the export's, or POSTGRES_DATABASE) and `user` (POSTGRES_USER); an export does not create "
        "databases or roles.",
    ),
    (
        # Supavisor, with the SQLSTATE of an internal error.
        r"[Tt]enant or user not found|tenant/user .* not found|no tenant identifier|user not found in the database",
        "Check `user` (POSTGRES_USER): on Supabase's pooler it is the role, a dot and the project's reference. A project "
        "that is paused is not found either.",
    ),
    (
        "permission denied for database",
        "Run as its owner: GRANT CONNECT ON DATABASE {database} TO {user};",
    ),
    (
        # libpq.
        "server requested a cleartext password",
        "The server asks for the password itself, and it was not sent. Set the role's password anew with "
        "password_encryption = 'scram-sha-256', and `scram-sha-256` in pg_hba.conf. Where it must be so (IAM tokens): "
        "`authentication` (POSTGRES_AUTHENTICATION) `password`, with `verify_server_identity: ca-and-hostname`.",
    ),
    (
        "server requested a hashed password",
        "The server asks for md5 of the password, and it was not sent. Set the role's password anew with "
        "password_encryption = 'scram-sha-256'. Where that cannot be: `authentication` (POSTGRES_AUTHENTICATION) `md5`.",
    ),
    (
        "server did not complete authentication",
        "The server lets the user in without a password, so it has not proved that it is yours. Give this user a `hostssl` "
        "line with `scram-sha-256` in pg_hba.conf. Where it must be so: `authentication` (POSTGRES_AUTHENTICATION) `none`.",
    ),
    (
        "authentication method requirement .* failed",
        "The server asks for something else at login than `authentication` (POSTGRES_AUTHENTICATION) allows: leave it out "
        "for SCRAM, Postgres's default.",
    ),
    (
        "hannel binding",
        "Somebody in between, or a pooler, ends the TLS connection. With a pooler of yours set `authentication` "
        "(POSTGRES_AUTHENTICATION) to `scram-sha-256`, and `verify_server_identity` to `ca-and-hostname`.",
    ),
    (
        "does not support SSL",
        "pg_exports never connects without TLS. Turn it on in the server (ssl = on, with a certificate).",
    ),
    (
        "does not match host name",
        "Set `host` (POSTGRES_HOST) to a name in the certificate, or `verify_server_identity` "
        "(POSTGRES_VERIFY_SERVER_IDENTITY) to `ca` to check only who signed it.",
    ),
    (
        "certificate verify failed",
        "The server's certificate is not signed by the authority in `root_certificate` (POSTGRES_ROOT_CERTIFICATE), or it "
        "has expired. Set `root_certificate` to the file of the authority that did sign it (with any intermediate ones), "
        "or to `system` for a public one; or renew the server's certificate.",
    ),
    (
        r"no pg_hba\.conf entry|pg_hba\.conf rejects",
        "The server does not let this user in from here over TLS: add a `hostssl` line to its pg_hba.conf.",
    ),
    (
        # Supavisor, Neon.
        "not in tenant allow_list|is not allowed to connect to this endpoint",
        "Add this machine's address to the addresses that the provider lets in.",
    ),
    (
        r"(Peer|Ident|GSSAPI|SSPI|certificate) authentication failed|GSSAPI continuation error|valid client certificate"
        r"|certificate required|authentication method \d+ not supported",
        "pg_exports logs in with a password: give this user a `hostssl` line with `scram-sha-256` in pg_hba.conf.",
    ),
    (
        "is not permitted to log in",
        "Run as a superuser: ALTER ROLE {user} LOGIN;",
    ),
    (
        "invalid port number",
        "Set `port` (POSTGRES_PORT) to the server's port, 5432 by default.",
    ),
)

# A pooler repeats the last refusal that it met itself: that one may be over.
_CACHED_REFUSAL = "server_login_retry"

_FEWER = "or let fewer exports connect at a time (`pools` in dagster.yaml)."

# Limits pass when others hang up; if they do not, somebody has to raise them.
_LIMITS = (
    (r'too many connections for role "(.*?)"', f'Run as a superuser: ALTER ROLE "{{0}}" CONNECTION LIMIT -1; {_FEWER}'),
    (
        r'too many connections for database "(.*?)"',
        f'Run as its owner: ALTER DATABASE "{{0}}" CONNECTION LIMIT -1; {_FEWER}',
    ),
    (
        "too many clients already|remaining connection slots",
        f"Raise the server's max_connections, put a pooler before it, {_FEWER}",
    ),
    (
        r"(max_client_conn|max_user_client_connections|max_db_client_connections|query_wait_timeout)",
        f"Raise PgBouncer's {{0}} or its pool's size, {_FEWER}",
    ),
    (
        r"FATAL: +(query|idle transaction|transaction)[ _]timeout",
        "A pooler ended it: raise PgBouncer's {0} timeout for this user, as an interval may take an hour.",
    ),
    (
        # Supavisor, RDS Proxy, Neon.
        "EMAXCONN|EMAXCLIENT|MaxClientsInSessionMode|[Mm]ax client connections reached|max clients reached"
        "|ECHECKOUTTIMEOUT|Unable to check out|maximum number of client connections"
        "|Timed-out waiting to acquire|[Tt]oo many (database )?connection",
        f"Raise the size of the pooler's pool, {_FEWER}",
    ),
)


class LockedError(PassingError):
    """Somebody else held a lock for longer than `lock_timeout`."""


def connecting(error: dbapi.Error, *, address: str, user: str, database: str) -> DestinationError | PassingError:
    """The error to raise when no connection could be made. What is not known to be permanent is taken as passing."""
    reason, state = messages.shown(error, of_rows=False), error.sqlstate or ""
    message = f"No connection to Postgres at {address}, database {database}, as {user}: {reason}"
    if state == _QUERY_CANCELED:
        # The driver reads the catalog before it takes any setting from us.
        return PassingError(
            f"{message}\nIf it is a statement_timeout, run as a superuser: ALTER ROLE {quoted(user)} SET "
            "statement_timeout = 0; an export bounds its statements itself."
        )
    # Of a host with two addresses one may refuse the connection and the other the password: the latter counts.
    for words, remedy in _PERMANENT_CONNECTS:
        if re.search(words, reason) and _CACHED_REFUSAL not in reason:
            return DestinationError(f"{message}\n{remedy.format(user=quoted(user), database=quoted(database))}")
    if state and not state.startswith(PASSING_SQLSTATES):
        return DestinationError(message)
    if "could not translate host name" in reason:
        return PassingError(f"{message}\nIs `host` (POSTGRES_HOST) right, and does this machine's name server answer?")
    if "FATAL" in reason:
        return PassingError(_with_limit(message, reason))
    return PassingError(
        f"{message}\nIs the server running, and are `host` and `port` (POSTGRES_HOST, POSTGRES_PORT) right?"
    )


def during(error: dbapi.Error, doing: str, *, of_rows: bool = False) -> DestinationError | PassingError:
    """The error to raise when a statement failed: what Postgres says, but for what may quote a row, and where it was.

    Args:
        error: the driver's.
        doing: what was being done.
        of_rows: the statement reads or writes rows of the destination.
    """
    message, state = messages.shown(error, of_rows=of_rows), error.sqlstate or ""
    if not state and error.status_code == AdbcStatusCode.IO:
        return PassingError(_with_limit(f"The connection to Postgres broke while {doing}: {message}", message))
    if _UNKNOWN_TYPES in message:
        return DestinationError(f"No statement can be sent while {doing}: {_UNKNOWN_TYPES_REMEDY}")
    refusal = f"Postgres refused while {doing}: {message}"
    if state == READ_ONLY or re.search("during recovery|recovery is in progress", message):
        return PassingError(f"{refusal}\n{_STANDBY_REMEDY}")
    if state == _LOCK_NOT_AVAILABLE:
        return LockedError(refusal)
    if state.startswith(PASSING_SQLSTATES):
        return PassingError(_with_limit(refusal, message))
    if state in _NOT_FOUND and messages.is_in_a_function(error):
        return DestinationError(f"{refusal}\n{_SEARCH_PATH_REMEDY}")
    if messages.is_about_a_row(error, of_rows=of_rows):
        return DestinationError(f"{refusal}\nWhich row it was is in Postgres's own log; it is quoted nowhere else.")
    return DestinationError(refusal)


def flooded(doing: str) -> DestinationError:
    """The error to raise when the server has sent more than any answer has."""
    return DestinationError(
        f"Postgres sent more than {ANSWER_BYTES // 1024**2} MB while {doing}, where a few rows were to be expected: the "
        "connection was given up. Is `host` (POSTGRES_HOST) the server that you mean?"
    )


def _with_limit(message: str, reason: str) -> str:
    """The message, and what to do if the reason is a limit on connections or a pooler's timeout."""
    for words, remedy in _LIMITS:
        match = re.search(words, reason)
        if match:
            return f"{message}\n{remedy.format(*match.groups())}"
    return message
