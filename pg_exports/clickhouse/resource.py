"""The ClickHouse connection: its settings, and a query's answer as a stream of Polars frames."""

import contextlib
import re
import ssl
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import dagster as dg
import polars as pl
import urllib3
from clickhouse_connect.driver.exceptions import Error
from pydantic import ConfigDict, Field, PrivateAttr

from pg_exports.at_launch import FixedAtLaunch
from pg_exports.clickhouse import arrow, errors, shards
from pg_exports.clickhouse import settings as query_settings
from pg_exports.clickhouse.answer import Answer, Body
from pg_exports.clickhouse.distributed import SourceTable, read_by
from pg_exports.clickhouse.http_client import DirectPool, QuietClient
from pg_exports.clickhouse.settings import ServerSettings
from pg_exports.errors import PassingError, SettingsError, SourceError
from pg_exports.models import FRAME_TYPES, IDENTITY, INTERVAL, STATE, Column, Model, Query, as_read
from pg_exports.models.model import PARAMETER_BYTES

CONNECT_TIMEOUT = 15
"""Seconds for a connection to be made."""

LONG_PAUSE = 25
"""Seconds. If the reader paused for longer, that may be why the answer broke off."""

READ_TIMEOUT = 300
"""Seconds without a byte after which a stream counts as frozen, where the resource does not say."""


class ClickHouseResource(FixedAtLaunch, dg.ConfigurableResource):  # type: ignore[type-arg]  # Dagster's own generic is not exported
    """A ClickHouse server, over HTTP or HTTPS. Neither redirects nor the environment's proxies are followed.

    Attributes:
        host: name or address.
        port: HTTP(S) port; 8123 by default, 8443 with `secure`.
        user, password, database: whom to connect as, and where PostHog's tables are.
        secure: HTTPS, with the server's certificate verified.
        ca_certificate: path of a PEM file with the authority that signed it; the system's authorities by default.
        settings: ClickHouse query settings for every query, such as `{"max_threads": 4}`. Those that would make answers
            wrong are undone; docs/clickhouse.md has what is set without them.
        read_timeout: seconds without a byte after which a stream counts as frozen.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    host: str
    port: int | None = None
    user: str = "default"
    password: str = Field(default="", repr=False)
    database: str = "default"
    secure: bool = False
    ca_certificate: str | None = None
    settings: dict[str, Any] = Field(default={})
    read_timeout: int = READ_TIMEOUT
    _server_settings: ServerSettings | None = PrivateAttr(default=None)
    _checked_tables: set[SourceTable] = PrivateAttr(default_factory=set)
    _connections: DirectPool | None = PrivateAttr(default=None)

    @property
    def address(self) -> str:
        """Where the server is, for messages."""
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port or (8443 if self.secure else 8123)}"

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Close the connections, as Dagster calls it after each run and each sensor's tick: a code server lives for weeks."""
        if self._connections is not None:
            self._connections.clear()

    @contextlib.contextmanager
    def frames(
        self,
        query: Query,
        model: Model,
        *,
        columns: Collection[str] | None = None,
        log_comment: str,
        query_id: str | None = None,
    ) -> Iterator[Iterator[pl.DataFrame]]:
        """Stream a model's rows: frames with the model's columns, in the types of `FRAME_TYPES`, and those beside them:
        `IDENTITY`, `STATE`, `INTERVAL`, and `AS_READ` where a value is one that a frame cannot hold.

        Memory is a few blocks of ClickHouse's, whatever the size of the answer.

        Args:
            query: the statement and its bound parameters.
            model: whose columns the answer has.
            columns: the optional and the added ones among these alone are read; all by default.
            log_comment: what ClickHouse's query log keeps beside the query.
            query_id: what it calls the query, of which no other may run at the same time; ClickHouse's own by default.

        Raises:
            SettingsError: the address or the authority cannot be one.
            SourceError: ClickHouse refused, or its answer has not the model's columns.
            PassingError: it did not answer, or the answer broke off before its end.
        """
        asked = {column.name for column in model.columns} if columns is None else columns
        needless = [
            column for column in model.columns if (column.optional or column.expression) and column.name not in asked
        ]
        query = query.without([column.name_in_answer for column in needless])
        with contextlib.ExitStack() as opened:
            with self._explained(query):
                client = opened.enter_context(contextlib.closing(self._client()))
                sent = self._with_settings(client, query, log_comment)
                answer = client.raw_stream(
                    sent.sql, dict(sent.parameters), settings=_named(query_id), fmt="ArrowStream"
                )
            body = Body(cast("Answer", answer))
            opened.callback(body.close)
            needed = [column for column in model.columns if column not in needless]
            yield self._frames(body, query, model, needed)

    def rows(
        self,
        query: Query,
        *,
        log_comment: str,
        query_id: str | None = None,
        settings: Mapping[str, query_settings.Value] | None = None,
    ) -> list[tuple[Any, ...]]:
        """The rows of a query with a small answer.

        Args:
            query: the statement and its bound parameters.
            log_comment: what ClickHouse's query log keeps beside the query.
            query_id: what it calls the query; ClickHouse's own by default.
            settings: of this query alone.

        Raises: as `frames`.
        """
        with self._explained(query), contextlib.closing(self._client()) as client:
            sent = self._with_settings(client, query, log_comment, settings)
            answer = client.query(sent.sql, dict(sent.parameters), settings=_named(query_id))
            return [tuple(row) for row in answer.result_rows]

    def count(self, query: Query, *, log_comment: str) -> int:
        """How many rows a query has; of its columns ClickHouse reads those that it needs for that.

        Raises: as `frames`.
        """
        counted = Query(f"SELECT count() FROM (\n{query.sql.strip()}\n)", query.parameters)
        [(rows,)] = self.rows(counted, log_comment=log_comment)
        return int(rows)

    def has_dictionary(self, name: str, *, log_comment: str = "") -> bool:
        """Whether the database has a dictionary that this user may see.

        Raises: as `frames`.
        """
        # `system.dictionaries` takes a grant of its own, where the server wants one for system tables.
        sql = (
            "SELECT count() FROM system.tables"
            " WHERE database = currentDatabase() AND name = {name:String} AND engine = 'Dictionary'"
        )
        [(found,)] = self.rows(Query(sql, {"name": name}), log_comment=log_comment)
        return bool(found)

    def _client(self) -> QuietClient:
        self._check_address()
        self._check_settings()
        return QuietClient(
            interface="https" if self.secure else "http",
            host=self.host,
            port=self.port or (8443 if self.secure else 8123),
            username=self.user,
            password=self.password,
            database=self.database,
            pool_mgr=self._pool,
            settings=dict(query_settings.HTTP),
            client_name="pg_exports",
            connect_timeout=CONNECT_TIMEOUT,
            send_receive_timeout=self.read_timeout,
            autogenerate_session_id=False,
            compress=False,
        )

    @property
    def _pool(self) -> DirectPool:
        """The connections, which queries use one after the other."""
        self._connections = self._connections or DirectPool(self.ca_certificate)
        return self._connections

    def _with_settings(
        self,
        client: QuietClient,
        query: Query,
        log_comment: str,
        more: Mapping[str, query_settings.Value] | None = None,
    ) -> Query:
        """The query as it is sent, with its SETTINGS clause and no parameter that is too long for ClickHouse."""
        server = self._server_settings = self._server_settings or self._settings_of_server(client)
        self._check_shards(client, query, server)
        settings = query_settings.of_query({**self.settings, **(more or {})}, server, log_comment)
        short = query.with_short_parameters()
        sql = f"{short.sql.strip()}\n{query_settings.clause(settings)}"
        # In a form, as long lists do not fit into a URL; unless the query itself does not fit into a form's field.
        client.form_encode_query_params = len(sql.encode()) <= PARAMETER_BYTES
        return Query(sql, short.parameters)

    def _check_shards(self, client: QuietClient, query: Query, server: ServerSettings) -> None:
        """Check each Distributed table once that the query may read. Raises: as `shards.check`."""
        settings = query_settings.of_query(self.settings, server, "")
        for table in read_by(server.tables, query.sql, self.database):
            if table not in self._checked_tables:
                shards.check(client, table, settings, self.address)
                self._checked_tables.add(table)

    def _settings_of_server(self, client: QuietClient) -> ServerSettings:
        # An older server does not know the settings of later versions. A newer one may give no answer without them.
        problem: Exception = SourceError(
            f"The profile of the ClickHouse user {self.user} has a `filter`, under which no query has an answer."
        )
        for of_later_versions in (True, False):
            try:
                rows = client.query(query_settings.discovery(of_later_versions=of_later_versions)).result_rows
            except Error as error:
                problem = error
            else:
                if len(rows) == 1:
                    return query_settings.discovered(*rows[0])
        raise problem

    def _check_address(self) -> None:
        # A value that is no host may be a whole URL with a password in it: it is not shown.
        if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", self.host):
            raise SettingsError(
                "ClickHouse's `host` (CLICKHOUSE_HOST) must be one host name or address ([::1] for IPv6), without "
                "scheme, user and port."
            )
        if self.port is not None and not 0 < self.port < 2**16:
            raise SettingsError(f"ClickHouse's `port` (CLICKHOUSE_PORT) must be 1 to 65535, not {self.port}.")
        if self.ca_certificate:
            try:
                ssl.create_default_context(cafile=self.ca_certificate)
            except OSError as error:
                raise SettingsError(
                    "ClickHouse's `ca_certificate` (CLICKHOUSE_CA_CERTIFICATE) must be a file of PEM certificates: "
                    f"{self.ca_certificate} is not ({error.strerror or error})."
                ) from None

    def _check_settings(self) -> None:
        for name, value in self.settings.items():
            if not re.fullmatch(r"[\w.]+", name) or not isinstance(value, int | float | str | dict) or value == "":
                raise SettingsError(
                    f"ClickHouse's `settings` have {name!r} with the value {value!r}. Each needs the name of one of "
                    "ClickHouse's settings, and a number, true or false, or a text that is not empty."
                )

    def _frames(self, body: Body, query: Query, model: Model, columns: Sequence[Column]) -> Iterator[pl.DataFrame]:
        with self._explained(query, body):
            for batch in arrow.batches(body):
                yield _conformed(model.finish(pl.DataFrame(pl.from_arrow(batch))), model, columns)

    @contextlib.contextmanager
    def _explained(self, query: Query, body: Body | None = None) -> Iterator[None]:
        """Raise what goes wrong in the block as an error that a person can read. `body`: the answer that it reads."""
        began = time.monotonic()
        try:
            yield
        except Error as error:
            explained = errors.explained(error, self.address, self._changed, self.settings, query)
        except arrow.TruncatedStreamError as error:
            if error.text:
                explained = errors.refused(error.text, error.code, self.address, self._changed, self.settings, query)
            else:
                explained = PassingError(
                    f"The answer of ClickHouse at {self.address} broke off before its end.{_why(body)}"
                )
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            explained = PassingError(f"The connection to ClickHouse at {self.address} broke: {error}{_why(body)}")
        else:
            return
        if errors.may_be_a_shutdown(explained) and self._has_restarted(time.monotonic() - began):
            raise PassingError(f"ClickHouse at {self.address} cancelled the query, as it shut down.") from None
        raise explained from None

    @property
    def _changed(self) -> Mapping[str, str]:
        """The settings of the user's profile, as far as they are known."""
        return self._server_settings.changed if self._server_settings else {}

    def _has_restarted(self, seconds: float) -> bool:
        """Whether the server does not answer, or has been up for less than so many seconds."""
        server = self._server_settings or ServerSettings(frozenset(), {})
        sql = f"SELECT uptime() {query_settings.clause(query_settings.of_query({}, server, ''))}"
        try:
            with contextlib.closing(self._client()) as client:
                [(uptime,)] = client.query(sql).result_rows
        except Error as error:
            return error.code is None
        return int(uptime) < seconds


def _why(body: Body | None) -> str:
    """Why an answer may have broken off: its reader paused for too long."""
    if body is None or body.longest_pause < LONG_PAUSE:
        return ""
    return (
        f"\nBefore that, Postgres took no rows for {body.longest_pause:.0f} s. ClickHouse closes the connection if the client "
        "reads nothing for 30 s (`http_send_timeout` of the server's default profile). Find out why Postgres was slow: locks, "
        "rows that it refuses one by one (the table pg_exports_rejected has the reasons), a full disk."
    )


def _named(query_id: str | None) -> dict[str, str]:
    return {} if query_id is None else {"query_id": query_id}


def _conformed(frame: pl.DataFrame, model: Model, columns: Sequence[Column]) -> pl.DataFrame:
    """The columns, each with its own name in its kind's type, `IDENTITY`, `STATE` and `INTERVAL` if the answer has them, and
    `AS_READ` where needed.

    A whole number past 64 bits is NULL, with its digits in `AS_READ`.

    Raises:
        SourceError: the answer lacks a column, or has one of another kind.
    """
    try:
        schema = frame.schema
        values = [_cast(schema.get(column.name_in_answer), column) for column in columns]
        beside = {IDENTITY: pl.UInt64, STATE: pl.UInt64, INTERVAL: pl.Int64}
        others = [pl.col(name).cast(dtype) for name, dtype in beside.items() if name in schema]
        originals = _renamed(as_read.originals(frame), columns)
        conformed = frame.select(*values, *others)
        for column in columns:
            if schema[column.name_in_answer] in _WIDER:
                read = frame[column.name_in_answer]
                lost = (conformed[column.name].is_null() & read.is_not_null()).arg_true()
                for row, number in zip(lost, read.gather(lost), strict=True):
                    originals.setdefault(row, {})[column.name] = number
        return as_read.with_originals(conformed, originals) if originals else conformed
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"What ClickHouse answers for {model.name} does not fit its columns: {error}") from None


def _renamed(originals: dict[int, dict[str, object]], columns: Sequence[Column]) -> dict[int, dict[str, object]]:
    """What the rows were by the columns' own names; what is read for `finish` alone is of no interest any more."""
    names = {column.name_in_answer: column.name for column in columns}
    return {
        row: {names[name]: value for name, value in values.items() if name in names}
        for row, values in originals.items()
    }


_WIDER = (pl.UInt64(), pl.Int128(), pl.UInt128())
"""Types of whole numbers that may be past `Kind.INTEGER`'s 64 bits."""


def _cast(dtype: pl.DataType | None, column: Column) -> pl.Expr:
    read = pl.col(column.name_in_answer).cast(FRAME_TYPES[column.kind], strict=dtype not in _WIDER)
    return read.alias(column.name)
