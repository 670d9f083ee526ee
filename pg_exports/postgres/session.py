"""One connection to Postgres in use: statements, transactions and COPY through ADBC, with errors that a person can read."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime

import pyarrow as pa
from adbc_driver_postgresql import dbapi

from pg_exports.postgres import errors

LOCK_TIMEOUT = 600
"""Seconds to wait for another run that holds the interval or the table."""

IDLE_TIMEOUT = 900
"""Seconds that the server lets a transaction wait for the next statement, should this process freeze."""


class Session:
    """A connection in autocommit mode, in which transactions are begun and ended by statement.

    ADBC's own transactions cannot go back to a savepoint ("current transaction is aborted").
    """

    def __init__(self, connection: dbapi.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *parameters: object, doing: str) -> list[tuple[object, ...]]:
        """The rows of one statement.

        Args:
            sql: one statement, with $1, $2, ... for parameters; `$1::text::timestamptz` for a time.
            parameters: their values.
            doing: what is being done, for the error.

        Raises:
            DestinationError, PassingError: Postgres refused.
        """
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, _bound(parameters))
                return [tuple(row) for row in cursor.fetchall()]
        except dbapi.Error as error:
            raise errors.during(error, doing) from None

    def arrow(self, sql: str, *parameters: object, doing: str) -> pa.Table:
        """The rows of one statement as an Arrow table. Raises as `rows`."""
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, _bound(parameters))
                return cursor.fetch_arrow_table()
        except dbapi.Error as error:
            raise errors.during(error, doing) from None

    def execute(self, sql: str, *parameters: object, doing: str) -> None:
        """Run one statement whose answer does not matter. Raises as `rows`."""
        self.rows(sql, *parameters, doing=doing)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """BEGIN and COMMIT around a block; ROLLBACK when it raises.

        READ COMMITTED, because a statement after a lock must see what the lock's last holder committed; READ WRITE,
        because servers may default to read-only.
        """
        self.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", doing="beginning a transaction")
        try:
            self.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'", doing="setting lock_timeout")
            self.execute(
                f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}s'",
                doing="setting idle_in_transaction_session_timeout",
            )
            yield
            self.execute("COMMIT", doing="committing")
        except BaseException:
            with contextlib.suppress(Exception):
                self.execute("ROLLBACK", doing="rolling back")
            raise

    def copy(self, schema: str, table: str, batches: pa.Table) -> int:
        """COPY rows into a table that exists; the columns are the Arrow table's, by name. Gives the number of rows.

        Raises:
            dbapi.Error: Postgres refused; the caller knows which rows these are.
        """
        with self._connection.cursor() as cursor:
            return int(cursor.adbc_ingest(table, batches, mode="append", db_schema_name=schema))


def _bound(parameters: Sequence[object]) -> list[object] | None:
    """Parameters as ADBC may have them: times as text.

    Around a parameter with a time zone the driver says SET TIME ZONE, in a BEGIN and COMMIT of its own, which commits the
    transaction that is open.
    """
    bound = [value.isoformat() if isinstance(value, datetime) else value for value in parameters]
    return bound or None
