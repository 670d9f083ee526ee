"""The ClickHouse connection: its settings, and a query's answer as a stream of Polars frames."""

import contextlib
import re
import ssl
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import clickhouse_connect
import dagster as dg
import polars as pl
import urllib3
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import Error
from pydantic import ConfigDict, Field

from pg_exports.clickhouse import arrow, errors
from pg_exports.errors import PassingError, SettingsError, SourceError
from pg_exports.models import FRAME_TYPES, IDENTITY, INTERVAL, Column, Model, Query, as_read

CONNECT_TIMEOUT = 15
"""Seconds for a connection to be made."""

READ_TIMEOUT = 300
"""Seconds without a byte after which a stream counts as frozen, where the resource does not say."""


_WHOLE_ANSWERS: Mapping[str, int | str] = {
    "limit": 0,
    "offset": 0,
    "skip_unavailable_shards": 0,
    "distributed_group_by_no_merge": 0,
    "use_query_cache": 0,
    **{
        f"{what}_overflow_mode": "throw"
        for what in ("distinct", "group_by", "join", "read", "result", "set", "sort", "timeout", "transfer")
    },
    "read_overflow_mode_leaf": "throw",
    "timeout_overflow_mode_leaf": "throw",
    "output_format_arrow_string_as_string": 1,
}
"""A user's profile may have settings under which ClickHouse ends a shortened answer like a whole one, leaves a group once
for each shard, or sends text as bytes that nobody has checked. These undo them, and no connection's `settings` wins over
them."""

REPLICA_DELAY = 60
"""Seconds that a replica may be behind. A schedule's run begins a minute after its interval's end, so what is behind by less
has all of the interval. ClickHouse's own default is 300."""

_OF_CLUSTERS: Mapping[str, int | str] = {
    # A subquery of the user's own over a Distributed table is read once, for all shards: `local` reads a shard's part of it.
    "distributed_product_mode": "global",
    # True only of rows that came through the Distributed table, and not of those that consumers wrote to the shards.
    "optimize_skip_unused_shards": 0,
    # Of tables with a sampling key each replica would read a share, and a share of all there is only where none is behind.
    "max_parallel_replicas": 1,
    "max_replica_delay_for_distributed_queries": REPLICA_DELAY,
    "fallback_to_stale_replicas_for_distributed_queries": 0,
}
"""Settings for Distributed tables under which answers are right however the rows lie. They win over the user's profile; a
connection's `settings` win over them, as who knows the cluster may know better."""


class Answer(arrow.ByteSource, Protocol):
    """An HTTP answer that can be given back before its end."""

    def shutdown(self) -> None:
        """Break off whatever is being read."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class ClickHouseResource(dg.ConfigurableResource):  # type: ignore[type-arg]  # Dagster's own generic is not exported
    """A ClickHouse server, over HTTP or HTTPS.

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

    @property
    def address(self) -> str:
        """Where the server is, for messages."""
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port or (8443 if self.secure else 8123)}"

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
        `INTERVAL`, `IDENTITY` for a model with fingerprints, `AS_READ` where a value is one that a frame cannot hold.

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
            with self._explained():
                client = opened.enter_context(contextlib.closing(self._client()))
                settings = self._settings(client, log_comment, query_id)
                answer = client.raw_stream(query.sql, dict(query.parameters), settings=settings, fmt="ArrowStream")
            opened.callback(_hang_up, cast("Answer", answer))
            needed = [column for column in model.columns if column not in needless]
            yield self._frames(_Body(cast("Answer", answer)), model, needed)

    def rows(self, query: Query, *, log_comment: str, query_id: str | None = None) -> list[tuple[Any, ...]]:
        """The rows of a query with a small answer. Arguments and errors as those of `frames`."""
        with self._explained(), contextlib.closing(self._client()) as client:
            settings = self._settings(client, log_comment, query_id)
            return [
                tuple(row) for row in client.query(query.sql, dict(query.parameters), settings=settings).result_rows
            ]

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
        sql = "SELECT count() FROM system.dictionaries WHERE database = currentDatabase() AND name = {name:String}"
        [(found,)] = self.rows(Query(sql, {"name": name}), log_comment=log_comment)
        return bool(found)

    def _client(self) -> Client:
        self._check_address()
        return clickhouse_connect.get_client(
            interface="https" if self.secure else "http",
            host=self.host,
            port=self.port or (8443 if self.secure else 8123),
            username=self.user,
            password=self.password,
            database=self.database,
            ca_cert=self.ca_certificate,
            # ClickHouse reads no "True".
            settings={name: int(value) if isinstance(value, bool) else value for name, value in self.settings.items()},
            client_name="pg_exports",
            connect_timeout=CONNECT_TIMEOUT,
            send_receive_timeout=self.read_timeout,
            autogenerate_session_id=False,
            # In the body, as a long list of event names would not fit into a URL.
            form_encode_query_params=True,
            compress=False,
        )

    def _settings(self, client: Client, log_comment: str, query_id: str | None) -> dict[str, int | str]:
        """The settings of one query, which win over those of the client, which are the connection's."""
        defaults = {name: value for name, value in _OF_CLUSTERS.items() if name not in self.settings}
        # A server that is too old for a setting has nothing to undo either, and would refuse its name.
        known = {
            name: value for name, value in {**defaults, **_WHOLE_ANSWERS}.items() if name in client.server_settings
        }
        named = {} if query_id is None else {"query_id": query_id}
        return {**known, "log_comment": log_comment, **named}

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

    def _frames(self, answer: arrow.ByteSource, model: Model, columns: Sequence[Column]) -> Iterator[pl.DataFrame]:
        with self._explained():
            for batch in arrow.batches(answer):
                yield _conformed(model.finish(pl.DataFrame(pl.from_arrow(batch))), model, columns)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Error as error:
            raise errors.explained(error, self.address) from None
        except arrow.TruncatedStreamError as error:
            if error.text:
                raise errors.refused(error.text, error.code, self.address) from None
            raise PassingError(f"The answer of ClickHouse at {self.address} broke off before its end.") from None
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            raise PassingError(f"The connection to ClickHouse at {self.address} broke: {error}") from None


class _Body:
    """An answer's body, which ends where the connection breaks: ClickHouse breaks it behind an exception's text."""

    def __init__(self, answer: arrow.ByteSource) -> None:
        self._answer = answer
        self._is_broken = False

    def read(self, size: int, /) -> bytes:
        if self._is_broken:
            return b""
        try:
            return self._answer.read(size)
        except urllib3.exceptions.ProtocolError as error:
            self._is_broken = True
            partial = getattr(error.args[-1], "partial", b"")
            return partial if isinstance(partial, bytes) else b""


def _hang_up(answer: Answer) -> None:
    """Close an answer, from which another thread may be reading: that one ends too."""
    with contextlib.suppress(ValueError, RuntimeError, OSError):
        answer.shutdown()
    answer.close()


def _conformed(frame: pl.DataFrame, model: Model, columns: Sequence[Column]) -> pl.DataFrame:
    """The columns, each with its own name in its kind's type, `IDENTITY` for a model with fingerprints, `INTERVAL`, and
    `AS_READ` where needed.

    A whole number past 64 bits is NULL, with its digits in `AS_READ`.

    Raises:
        SourceError: the answer lacks a column, or has one of another kind.
    """
    try:
        schema = frame.schema
        values = [_cast(schema.get(column.name_in_answer), column) for column in columns]
        others = [pl.col(IDENTITY).cast(pl.UInt64)] if model.fingerprints else []
        others += [pl.col(INTERVAL).cast(pl.Int64)] if INTERVAL in schema else []
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
