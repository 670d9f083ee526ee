"""One connection to Postgres in use: statements, transactions and COPY through ADBC, with errors that a person can read.

Every wait is bounded: for a lock by the server, for an answer by a watchdog, for the next statement by the server again.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn, TypeVar

import pyarrow as pa
from adbc_driver_postgresql import dbapi

from pg_exports.errors import DestinationError, PassingError
from pg_exports.postgres import errors
from pg_exports.postgres.watchdog import ANSWER_BYTES, Watchdog

LOCK_TIMEOUT = 600
"""Seconds to wait for another run that holds the interval or the table."""

IDLE_TIMEOUT = 900
"""Seconds that the server lets a transaction wait for the next statement, should this process freeze."""

MERGE_TIMEOUT = 3600
"""Seconds that the one statement of a merge may take, or of reading a table back."""

# Before anything else: what others have created in a schema that is searched must not be taken for Postgres's own functions
# and operators, which it would be where it fits the types better (CVE-2018-1058). SET itself calls none.
# Notices, as of a trigger for each row, nobody reads.
_BEGIN = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SET LOCAL search_path = pg_catalog, pg_temp;
SET LOCAL client_min_messages = error
"""

# For this transaction alone, as a pooler gives the connection to others after it. A statement is bounded by the watchdog and
# by its locks, not by a statement_timeout or transaction_timeout (PostgreSQL 17 and later) of the role, the database or the
# server: a COPY or a merge may take longer. A commit that was acknowledged outlives a crash, even if synchronous_commit is
# off. A server notices a client that has gone: by TCP's own means while it waits for a statement, by looking every ten
# seconds while it works on one (PostgreSQL 14 and later). Locks are free again then.
_SETTINGS = """
SELECT
    pg_backend_pid(),
    (extract(epoch FROM now()) * 1000000)::bigint,
    current_setting('session_replication_role'),
    set_config('statement_timeout', '0', true),
    CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
        THEN set_config('transaction_timeout', '0', true)
    END,
    set_config('lock_timeout', $1, true),
    set_config('idle_in_transaction_session_timeout', $2, true),
    CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END,
    set_config('tcp_keepalives_idle', '60', true),
    set_config('tcp_keepalives_interval', '15', true),
    set_config('tcp_keepalives_count', '8', true),
    CASE WHEN current_setting('client_connection_check_interval', true) IS NOT NULL
        THEN set_config('client_connection_check_interval', '10s', true)
    END
"""

# In the session, which may wait long between two transactions, and only if the setting is there: a pooler keeps it.
_NO_IDLE_TIMEOUT = """
SELECT pg_catalog.set_config('idle_session_timeout', '0', false)
WHERE pg_catalog.current_setting('idle_session_timeout', true) OPERATOR(pg_catalog.<>) '0'::pg_catalog.text
"""

_REPLICA = (
    "session_replication_role is `replica` for this role or database: triggers and foreign keys of the table would not see "
    "the rows. Run as a superuser: ALTER ROLE ... RESET session_replication_role; or ALTER DATABASE ... RESET it."
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ServerTransaction:
    """A transaction as the server knows it: its process, and when it began, in microseconds since 1970."""

    process: int
    started: int


class Session:
    """A connection in autocommit mode, in which transactions are begun and ended by statement.

    ADBC's own transactions cannot go back to a savepoint ("current transaction is aborted").

    Attributes:
        lost: the transaction that was open when the connection broke; the server may hold it, and its locks, for a while.
    """

    def __init__(self, connection: dbapi.Connection, watchdog: Watchdog, read_timeout: float) -> None:
        """`read_timeout`: seconds without an answer after which the connection counts as frozen."""
        self._connection = connection
        self._watchdog = watchdog
        self._read_timeout = read_timeout
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="pg_exports driver")
        self._transaction: ServerTransaction | None = None
        self._is_in_transaction = False
        self.lost: ServerTransaction | None = None

    @functools.cached_property
    def version(self) -> int:
        """The server's version, as 150004 for 15.4. Raises as `rows`."""
        [(version,)] = self.rows(
            "SELECT current_setting('server_version_num')", doing="asking for the server's version"
        )
        return int(str(version))

    def rows(
        self, sql: str, *parameters: object, doing: str, patience: float = 0, of_rows: bool = False
    ) -> list[tuple[object, ...]]:
        """The rows of one statement. Outside a transaction it gets one of its own.

        Args:
            sql: one statement, with $1, $2, ... for parameters; `$1::text::timestamptz` for a time.
            parameters: their values.
            doing: what is being done, for the error.
            patience: seconds that the statement may take beyond `read_timeout`.
            of_rows: the statement reads or writes rows of the destination, which Postgres may quote in an error.

        Raises:
            DestinationError, PassingError: Postgres refused, or did not answer.
        """

        def answer(cursor: dbapi.Cursor) -> list[tuple[object, ...]]:
            return [tuple(row) for row in cursor.fetchall()]

        return self._answer(answer, sql, parameters, doing, patience, ANSWER_BYTES, of_rows=of_rows)

    def arrow(self, sql: str, *parameters: object, doing: str, patience: float = 0, of_rows: bool = False) -> pa.Table:
        """The rows of one statement as an Arrow table. Arguments and errors as those of `rows`."""

        def answer(cursor: dbapi.Cursor) -> pa.Table:
            return cursor.fetch_arrow_table()

        return self._answer(answer, sql, parameters, doing, patience, math.inf, of_rows=of_rows)

    def _answer(
        self,
        read: Callable[[dbapi.Cursor], Answer],
        sql: str,
        parameters: Sequence[object],
        doing: str,
        patience: float,
        answer_bytes: float,
        *,
        of_rows: bool,
    ) -> Answer:
        """What is read of a statement's answer."""

        def answer() -> Answer:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, _bound(parameters))
                return read(cursor)

        with self.transaction(doing):
            try:
                return self._bounded(answer, patience, answer_bytes)
            except dbapi.Error as error:
                self.explain(error, doing, of_rows=of_rows)

    def execute(self, sql: str, *parameters: object, doing: str, patience: float = 0, of_rows: bool = False) -> None:
        """Run one statement whose answer does not matter. Arguments and errors as those of `rows`."""
        self.rows(sql, *parameters, doing=doing, patience=patience, of_rows=of_rows)

    @contextlib.contextmanager
    def transaction(self, doing: str = "beginning a transaction") -> Iterator[None]:
        """BEGIN and COMMIT around a block; ROLLBACK when it raises. Within another transaction: a part of that one.

        Names are looked up in `pg_catalog` alone: tables are always written with their schema.
        READ COMMITTED, because a statement after a lock must see what the lock's last holder committed; READ WRITE,
        because servers may default to read-only.
        """
        if self._is_in_transaction:
            yield
            return
        self._send(_BEGIN, doing)
        self._is_in_transaction = True
        try:
            [(process, started, replication_role, *_)] = self.rows(
                _SETTINGS, f"{LOCK_TIMEOUT}s", f"{IDLE_TIMEOUT}s", doing="setting timeouts"
            )
            self._transaction = ServerTransaction(int(str(process)), int(str(started)))
            if replication_role == "replica":
                raise DestinationError(_REPLICA)
            yield
            self.execute("COMMIT", doing="committing", of_rows=True)
            self._transaction, self._is_in_transaction = None, False
        except BaseException:
            self.roll_back()
            raise

    def roll_back(self) -> None:
        """End the transaction now, before its block does, which must end by an error then. What is asked until it ends gets a
        transaction of its own.
        """
        if not self._is_in_transaction:
            return
        try:
            self.execute("ROLLBACK", doing="rolling back")
        except Exception:  # noqa: BLE001 - the error that led here is the one to raise
            self.lost = self._transaction
        finally:
            self._transaction, self._is_in_transaction = None, False

    def copy(self, schema: str, table: str, batches: pa.RecordBatchReader) -> int:
        """COPY rows into a table that exists; the columns are the batches', by name. Gives the number of rows sent.

        Raises:
            dbapi.Error: Postgres refused; the caller knows which rows these are, and lets `explain` speak for the rest.
        """

        def send() -> int:
            with self._connection.cursor() as cursor:
                return int(cursor.adbc_ingest(table, batches, mode="append", db_schema_name=schema))

        return self._bounded(send)

    def give_up(self) -> None:
        """From another thread, too: hang up, so that the statement that is running ends with an error.

        The protocol's request to cancel it is the last resort: the driver sends that in clear text, with the secret by which
        others could cancel statements, too.
        """
        if not self._watchdog.hang_up():
            with contextlib.suppress(dbapi.Error):
                self._connection.adbc_cancel()

    def explain(self, error: dbapi.Error, doing: str, *, of_rows: bool = False) -> NoReturn:
        """Raise the error that a user sees for one of the driver's.

        Raises:
            DestinationError, PassingError: as the driver's error has it; a frozen connection is a passing one.
        """
        if self._watchdog.was_flooded:
            raise errors.flooded(doing) from None
        if self._watchdog.has_acted:
            raise PassingError(
                f"Postgres stopped answering while {doing}: nothing for {self._read_timeout:.0f} s (the connection's "
                "`read_timeout`) and more. The connection was given up."
            ) from None
        raise errors.during(error, doing, of_rows=of_rows) from None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
        self._watchdog.close()
        self._driver.shutdown()

    def disable_idle_timeout(self) -> None:
        """Have the server keep the connection, however long it waits between transactions. Raises as `rows`."""
        self._send(_NO_IDLE_TIMEOUT, doing="setting timeouts")

    def _send(self, sql: str, doing: str) -> None:
        """Run a statement in one message: `rows` sends several, which a pooler may give to different servers outside a
        transaction.
        """

        def send() -> None:
            with self._connection.cursor() as cursor:
                cursor.executescript(sql)

        try:
            self._bounded(send)
        except dbapi.Error as error:
            self.explain(error, doing)

    def _bounded(self, call: Callable[[], Answer], patience: float = 0, answer_bytes: float = ANSWER_BYTES) -> Answer:
        """What a driver's call gives, within the time it may take, and the bytes that the answer may have.

        On a thread of its own: on the main one ADBC takes SIGINT for itself, and a run that Dagster tells to end would not
        hear of it. Here it does at once; the connection is given up then, and the server told to end its transaction (`lost`).
        """
        with self._watchdog.limit(self._read_timeout + patience, answer_bytes):
            running = self._driver.submit(call)
            try:
                return running.result()
            finally:
                while not running.done():
                    self.give_up()
                    wait([running], timeout=1)


def _bound(parameters: Sequence[object]) -> list[object] | None:
    """Parameters as ADBC may have them: times as text.

    Around a parameter with a time zone the driver says SET TIME ZONE, in a BEGIN and COMMIT of its own, which commits the
    transaction that is open.
    """
    bound = [value.isoformat() if isinstance(value, datetime) else value for value in parameters]
    return bound or None
