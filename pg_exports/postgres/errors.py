"""What Postgres's refusals mean, for the person who reads them. No message here ever holds a password."""

import re

from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres.identifiers import quoted

# Classes and codes of Postgres's "Appendix A" that a later try may not meet.
PASSING_SQLSTATES = (
    "08",  # connection exceptions
    "40",  # transaction rollback: deadlock, serialization
    "53",  # insufficient resources: disk, memory, connections
    "55P03",  # lock_not_available
    "57P",  # operator intervention: shutdown, cannot connect now
    "25P03",  # idle in transaction timeout
    "58030",  # I/O error
)

READ_ONLY = "25006"
"""read_only_sql_transaction. Servers change roles in a failover, so it may pass."""

_STANDBY_REMEDY = (
    "The server is a read-only standby, or was made read-only. If that does not pass by itself, set `host` "
    "(POSTGRES_HOST) to the primary."
)

_CONNECTION_LOST = (
    "server closed the connection",
    "could not receive data",
    "could not send data",
    "connection to server was lost",
    "no connection to the server",
    "SSL connection has been closed",
    "SSL SYSCALL error",
    "unexpected eof while reading",
    "Connection reset",
    "terminating connection",
)

# libpq's words for a failed connection (they carry no SQLSTATE), and what to do about each.
_CONNECT_REMEDIES = (
    (
        "password authentication failed",
        "Check the connection's `user` and `password` (for `postgres`: POSTGRES_USER, POSTGRES_PASSWORD).",
    ),
    (
        "no password supplied",
        "Set `password` (POSTGRES_PASSWORD).",
    ),
    (
        "does not exist",
        "Check `database` (the export's, or POSTGRES_DATABASE) and `user` (POSTGRES_USER); an export does not create "
        "databases or roles.",
    ),
    (
        "permission denied for database",
        "Run as its owner: GRANT CONNECT ON DATABASE {database} TO {user};",
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
        "no pg_hba.conf entry",
        "The server does not let this user in from here over TLS: add a `hostssl` line to its pg_hba.conf.",
    ),
    (
        "is not permitted to log in",
        "Run as a superuser: ALTER ROLE {user} LOGIN;",
    ),
    (
        "invalid port number",
        "Set `port` (POSTGRES_PORT) to the server's port, 5432 by default.",
    ),
    (
        "could not translate host name",
        "Check `host` (POSTGRES_HOST).",
    ),
)

_PASSING_CONNECTS = (
    "Connection refused",
    "timeout expired",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "too many clients",
    "too many connections",
    "remaining connection slots",
    "is starting up",
    "is not yet accepting connections",
    "is shutting down",
    "in recovery mode",
    *_CONNECTION_LOST,
)


def connecting(error: dbapi.Error, *, address: str, user: str, database: str) -> DestinationError | PassingError:
    """The error to raise when no connection could be made."""
    reason = _libpq_text(error)
    said = f"No connection to Postgres at {address}, database {database}, as {user}: {reason}"
    if "Temporary failure in name resolution" in reason:
        return PassingError(f"{said}\nIs `host` (POSTGRES_HOST) right, and does this machine's name server answer?")
    # Before what passes: of a host with two addresses one may refuse the connection and the other the password.
    for words, remedy in _CONNECT_REMEDIES:
        if words in reason:
            return DestinationError(f"{said}\n{remedy.format(user=quoted(user), database=quoted(database))}")
    if any(words in reason for words in _PASSING_CONNECTS):
        return PassingError(
            f"{said}\nIs the server running, and are `host` and `port` (POSTGRES_HOST, POSTGRES_PORT) right?"
        )
    return DestinationError(said)


def during(error: dbapi.Error, doing: str) -> DestinationError | PassingError:
    """The error to raise when a statement failed: Postgres's own message, detail and context, and where it was."""
    message, state = server_message(error), error.sqlstate or ""
    if not state and any(words in str(error) for words in _CONNECTION_LOST):
        return PassingError(f"The connection to Postgres broke while {doing}: {message}")
    said = f"Postgres refused while {doing}: {message}"
    if state == READ_ONLY or "during recovery" in message:
        return PassingError(f"{said}\n{_STANDBY_REMEDY}")
    if state.startswith(PASSING_SQLSTATES):
        return PassingError(said)
    return DestinationError(said)


def server_message(error: dbapi.Error) -> str:
    """Postgres's primary message with its detail, hint and context (which for COPY names line and column)."""
    fields = _fields(error)
    parts = [
        fields[name]
        for name in ("PG_DIAG_MESSAGE_PRIMARY", "PG_DIAG_MESSAGE_DETAIL", "PG_DIAG_MESSAGE_HINT", "PG_DIAG_CONTEXT")
        if name in fields
    ]
    return "; ".join(parts) if parts else _libpq_text(error)


def copy_line(error: dbapi.Error, table: str) -> int | None:
    """The line of a COPY into `table` at which Postgres refused, from 1.

    Only the context's last line counts: every other part of the message may quote a value that looks like it. The word
    for "line" is in the server's language.
    """
    last = _fields(error).get("PG_DIAG_CONTEXT", "").rsplit("\n", 1)[-1]
    found = re.match(rf"COPY {re.escape(table)}, \D*(\d+)", last)
    return int(found.group(1)) if found else None


def constraint(error: dbapi.Error) -> str:
    """The name of the constraint that refused, or nothing."""
    return _fields(error).get("PG_DIAG_CONSTRAINT_NAME", "")


def _fields(error: dbapi.Error) -> dict[str, str]:
    return {
        name.decode() if isinstance(name, bytes) else name: value.decode(errors="replace")
        for name, value in (error.details or [])
    }


def _libpq_text(error: dbapi.Error) -> str:
    text = re.sub(r"^.*?\[libpq\] (Failed to connect: )?", "", str(error), flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", " ", text).strip()
