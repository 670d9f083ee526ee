"""The Postgres connection: where it is, as whom, and how its identity is verified."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import dagster as dg
from adbc_driver_postgresql import dbapi
from pydantic import ConfigDict, Field

from pg_exports.at_launch import FixedAtLaunch
from pg_exports.errors import PassingError, SettingsError
from pg_exports.postgres import errors, login, tls
from pg_exports.postgres.session import ServerTransaction, Session
from pg_exports.postgres.watchdog import Watchdog, new_connection, open_sockets

CONNECT_TIMEOUT = 15
"""Seconds for a connection to be made, TLS and password included."""

HASHING_SECONDS = 15
"""Seconds for the hashing of a password beyond that. Postgres's own 4,096 rounds take about 10 ms."""

READ_TIMEOUT = 300
"""Seconds without an answer after which a connection counts as frozen, where the resource does not say."""

_CONNECTING = threading.Lock()

# libpq reads a file of connection settings if the environment names a service, and asks the server for settings of the
# session; no setting of the connection can say that it should not.
_VARIABLES = ("PGSERVICE", "PGDATESTYLE", "PGGEQO", "PGTZ")

# A peer that vanished without a word is noticed within about three minutes.
_LIVENESS = {"keepalives_idle": 60, "keepalives_interval": 15, "keepalives_count": 8}
TCP_USER_TIMEOUT = 180
"""Seconds for sent data to be acknowledged."""

# Of the transaction that was lost, and no other: a pooler may have given the server's process to somebody else.
_END = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE pid = $1 AND (extract(epoch FROM xact_start) * 1000000)::bigint = $2 AND usename = session_user
"""

# Given, so that libpq takes none of them from the environment or the home folder. Beside them are those of `tls` and `login`.
_FIXED = {
    "hostaddr": "",
    "passfile": "/nonexistent/pg_exports",
    "client_encoding": "UTF8",
    "requirepeer": "",
    "gssdelegation": "0",
    "min_protocol_version": "3.0",
    "max_protocol_version": "3.0",
    "target_session_attrs": "any",
    "load_balance_hosts": "disable",
    "application_name": "pg_exports",
}


# For what the driver asks before our first statement. `session` has the reason.
_OPTIONS = "-csearch_path=pg_catalog,pg_temp -cclient_min_messages=error"

# PgBouncer; RDS Proxy.
_NO_OPTIONS = re.compile("unsupported startup parameter|support command-line options")

_WITHOUT_OPTIONS: set[tuple[str, int]] = set()
"""Poolers that take no options, by host and port."""


class PostgresResource(FixedAtLaunch, dg.ConfigurableResource):  # type: ignore[type-arg]  # Dagster's own generic is not exported
    """A Postgres server with credentials and TLS settings, used by any number of exports.

    Every connection is encrypted; there is no fallback to plain text.

    Attributes:
        host: name or address; TCP only, as TLS needs it.
        port: TCP port.
        user, password, database: whom to connect as, and the database of exports that name none.
        verify_server_identity: `no`, `ca` or `ca-and-hostname` (default).
        root_certificate: `system` (default), a path to a .crt, .pem, .cer or .ca-bundle file, or PEM text. With
            `verify_server_identity: no` it is ignored, and the log says so.
        authentication: what the server may ask for at login: `scram-sha-256` (default), `scram-sha-256-plus`, `md5`,
            `password` or `none`. `login.Authentication` has what each means.
        read_timeout: seconds without an answer after which a connection counts as frozen. Waiting for another run's lock,
            and a merge, may take longer.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    host: str
    port: int = 5432
    user: str
    password: str = Field(default="", repr=False)
    database: str
    verify_server_identity: tls.VerifyServerIdentity = "ca-and-hostname"
    root_certificate: str = Field(default=tls.SYSTEM, repr=False)
    authentication: login.Authentication = "scram-sha-256"
    read_timeout: int = READ_TIMEOUT

    @contextlib.contextmanager
    def session(self, database: str | None = None, log: logging.Logger | None = None) -> Iterator[Session]:
        """A connection for as long as the block lasts.

        Args:
            database: another database than the connection's own.
            log: where to say that a root certificate is ignored, and what the settings do not protect from.

        Raises:
            SettingsError: `host` is none, `user` or `database` is empty, `read_timeout` is not positive, the root certificate
                is missing, empty, or no certificate, or the password would go to a server that is not verified.
            DestinationError: the server refused, or its identity could not be verified.
            PassingError: it does not answer.
        """
        database = database or self.database
        self.check(database)
        if log:
            for warning in self.warnings():
                log.warning(warning)
            if self.verify_server_identity == "no" and self.root_certificate != tls.SYSTEM:
                log.info("`root_certificate` is ignored: `verify_server_identity` is `no`.")
        session = self._open(database)
        try:
            yield session
        finally:
            session.close()
            if session.lost:
                self._end(session.lost, database)

    def _open(self, database: str) -> Session:
        # One connection at a time is made in a process: the watchdog's is the one that is new.
        with _CONNECTING:
            before = set(open_sockets())
            watchdog = Watchdog(lambda: new_connection(before, self.port))
            try:
                # The driver's first questions to the server are not bounded by CONNECT_TIMEOUT.
                with (
                    tls.libpq_settings(self.verify_server_identity, self.root_certificate) as encryption,
                    watchdog.limit(CONNECT_TIMEOUT + self.read_timeout),
                ):
                    connection = self._connect_in_time(database, encryption)
                watchdog.keep(new_connection(before, self.port))
            except BaseException:
                watchdog.close()
                if watchdog.was_flooded:
                    raise errors.flooded("logging in") from None
                raise
        session = Session(connection, watchdog, self.read_timeout)
        try:
            session.disable_idle_timeout()
        except BaseException:
            session.close()
            raise
        return session

    def _end(self, lost: ServerTransaction, database: str) -> None:
        """Have the server end a transaction whose connection broke, so that the next try need not wait for its locks."""
        with (
            contextlib.suppress(Exception),
            contextlib.closing(self._open(database)) as session,
            session.transaction(),
        ):
            # The settings of a role may make its sessions act as another one, which may not end the role's transactions.
            session.execute("SET LOCAL ROLE NONE", doing="ending a lost transaction")
            session.execute(_END, lost.process, lost.started, doing="ending a lost transaction")

    def warnings(self) -> list[str]:
        """What the settings do not protect from, a sentence each."""
        found = []
        if self.verify_server_identity == "ca" and self.root_certificate == tls.SYSTEM:
            found.append(
                "`verify_server_identity: ca` with `root_certificate: system` trusts everybody who has a certificate of any "
                "public authority, and so anybody in between. Set `verify_server_identity` to `ca-and-hostname`, or "
                "`root_certificate` to the authority that signed this server's certificate."
            )
        if self.authentication in ("md5", "none") and self.verify_server_identity != "ca-and-hostname":
            found.append(
                f"`authentication: {self.authentication}` with `verify_server_identity: {self.verify_server_identity}`: who "
                "is in between can act as this user. Set `verify_server_identity` to `ca-and-hostname`."
            )
        return found

    def check(self, database: str) -> None:
        """Refuse settings that libpq would misread, or that would give the password away. Raises SettingsError."""
        login.libpq_settings(self.authentication, self.verify_server_identity)
        if self.read_timeout < 1:
            raise SettingsError("`read_timeout` must be a second or more.")
        # Postgres answers a URL with an error that repeats it, password and all.
        if not re.fullmatch(r"[^\s\0/@,=]+", self.host):
            raise SettingsError(
                "`host` (POSTGRES_HOST) must be one host name or address, and no URL; a Unix socket is never encrypted."
            )
        # libpq takes an empty user from the operating system, and an empty database from the user.
        for setting, value in (("user", self.user), ("database", database)):
            if not value.strip():
                raise SettingsError(f"`{setting}` (POSTGRES_{setting.upper()}) is empty. Set it.")
        for setting, value in (("user", self.user), ("database", database), ("password", self.password)):
            if "\0" in value:
                raise SettingsError(
                    f"`{setting}` (POSTGRES_{setting.upper()}) holds a NUL, which Postgres cannot have."
                )

    def _connect_in_time(self, database: str, encryption: dict[str, str]) -> dbapi.Connection:
        """As `_connect`, on a thread that is left alone if it takes too long: at a login libpq hashes the password as often as
        the server says, and nothing ends that.
        """
        made: Future[dbapi.Connection] = Future()

        def connect() -> None:
            try:
                made.set_result(self._connect(database, encryption))
            except BaseException as error:  # noqa: BLE001 - for the thread that waits
                made.set_exception(error)

        threading.Thread(target=connect, name="pg_exports login", daemon=True).start()
        try:
            return made.result(CONNECT_TIMEOUT + self.read_timeout + HASHING_SECONDS)
        except TimeoutError:
            raise PassingError(
                f"The login to Postgres at {self.host}:{self.port} does not end: the server has the password hashed far more "
                "often than Postgres does. Is `host` (POSTGRES_HOST) the server that you mean?"
            ) from None
        finally:
            if not made.done():
                made.add_done_callback(lambda late: late.exception() or late.result().close())

    def _connect(self, database: str, encryption: dict[str, str]) -> dbapi.Connection:
        settings: dict[str, object] = {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "dbname": database,
            "connect_timeout": CONNECT_TIMEOUT,
            **_FIXED,
            **_LIVENESS,
            "tcp_user_timeout": 1000 * min(TCP_USER_TIMEOUT, self.read_timeout),
            **encryption,
            **login.libpq_settings(self.authentication, self.verify_server_identity),
        }
        try:
            with _without_variables():
                return self._with_search_path(settings)
        except dbapi.Error as error:
            raise errors.connecting(
                error, address=f"{self.host}:{self.port}", user=self.user, database=database
            ) from None

    def _with_search_path(self, settings: dict[str, object]) -> dbapi.Connection:
        """Connect with the search path of our transactions, or, to a pooler that takes none, with the role's own."""
        address = (self.host, self.port)
        if address not in _WITHOUT_OPTIONS:
            try:
                return dbapi.connect(_conninfo({**settings, "options": _OPTIONS}), autocommit=True)
            except dbapi.Error as error:
                if not _NO_OPTIONS.search(str(error)):
                    raise
                _WITHOUT_OPTIONS.add(address)
        return dbapi.connect(_conninfo({**settings, "options": ""}), autocommit=True)


@contextlib.contextmanager
def _without_variables() -> Iterator[None]:
    """The environment without `_VARIABLES` for as long as the block lasts."""
    taken = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _conninfo(settings: dict[str, object]) -> str:
    """A libpq connection string ("Keyword/Value Connection Strings")."""
    return " ".join(f"{name}='{_escaped(str(value))}'" for name, value in settings.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
