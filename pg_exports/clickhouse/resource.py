"""The ClickHouse connection: its settings, and a query's answer as a stream of Polars frames."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import clickhouse_connect
import dagster as dg
import polars as pl
import pyarrow as pa
import urllib3
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import Error
from pydantic import ConfigDict, Field

from pg_exports.clickhouse import arrow, errors
from pg_exports.errors import PassingError, SettingsError, SourceError
from pg_exports.models import FRAME_TYPES, Model, Query

CONNECT_TIMEOUT = 15
"""Seconds for a connection to be made."""

READ_TIMEOUT = 300
"""Seconds without a byte after which a stream counts as frozen."""


class Answer(arrow.ByteSource, Protocol):
    """An HTTP answer that can be given back before its end."""

    def close(self) -> None:
        """Hang up."""
        ...


class ClickHouseResource(dg.ConfigurableResource):  # type: ignore[type-arg]  # Dagster's own generic is not exported
    """A ClickHouse server, over HTTP or HTTPS.

    Attributes:
        host: name or address.
        port: HTTP(S) port; 8123 by default, 8443 with `secure`.
        user, password, database: whom to connect as, and where PostHog's tables are.
        secure: HTTPS, with the server's certificate verified.
        ca_certificate: path of a PEM file with the authority that signed it; the system's authorities by default.
        settings: ClickHouse query settings for every query, such as `{"max_threads": 4}`.
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

    @property
    def address(self) -> str:
        """Where the server is, for messages."""
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port or (8443 if self.secure else 8123)}"

    @contextlib.contextmanager
    def frames(self, query: Query, model: Model, *, log_comment: str) -> Iterator[Iterator[pl.DataFrame]]:
        """Stream a model's rows: frames with exactly the model's columns, in the types of `FRAME_TYPES`.

        Memory is a few blocks of ClickHouse's, whatever the size of the answer.

        Args:
            query: the statement and its bound parameters.
            model: whose columns the answer has.
            log_comment: what ClickHouse's query log keeps beside the query.

        Raises:
            SourceError: ClickHouse refused, or a value does not fit its column.
            PassingError: it did not answer, or the answer broke off before its end.
        """
        with contextlib.ExitStack() as opened:
            with self._explained():
                client = opened.enter_context(contextlib.closing(self._client()))
                answer = client.raw_stream(
                    query.sql, dict(query.parameters), settings={"log_comment": log_comment}, fmt="ArrowStream"
                )
            yield self._frames(opened.enter_context(contextlib.closing(cast("Answer", answer))), model)

    def has_dictionary(self, name: str) -> bool:
        """Whether the database has a dictionary that this user may see.

        Raises: as `frames`.
        """
        sql = "SELECT count() FROM system.dictionaries WHERE database = currentDatabase() AND name = {name:String}"
        with self._explained(), contextlib.closing(self._client()) as client:
            return bool(client.query(sql, {"name": name}).result_rows[0][0])

    def _client(self) -> Client:
        if self.ca_certificate and not Path(self.ca_certificate).is_file():
            raise SettingsError(
                f"ClickHouse's `ca_certificate` (CLICKHOUSE_CA_CERTIFICATE) is no file: {self.ca_certificate}"
            )
        return clickhouse_connect.get_client(
            interface="https" if self.secure else "http",
            host=self.host,
            port=self.port or (8443 if self.secure else 8123),
            username=self.user,
            password=self.password,
            database=self.database,
            ca_cert=self.ca_certificate,
            settings=dict(self.settings),
            client_name="pg_exports",
            connect_timeout=CONNECT_TIMEOUT,
            send_receive_timeout=READ_TIMEOUT,
            autogenerate_session_id=False,
            compress=False,
        )

    def _frames(self, answer: arrow.ByteSource, model: Model) -> Iterator[pl.DataFrame]:
        with self._explained():
            for batch in arrow.batches(answer):
                yield _conformed(model.finish(pl.DataFrame(pl.from_arrow(batch))), model)

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
        except pa.ArrowInvalid as error:
            raise SourceError(f"ClickHouse at {self.address} holds a text that is no UTF-8: {error}") from None
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            raise PassingError(f"The connection to ClickHouse at {self.address} broke: {error}") from None


def _conformed(frame: pl.DataFrame, model: Model) -> pl.DataFrame:
    """The model's columns, each in its kind's type.

    Raises:
        SourceError: a whole number is too great for 64 bits.
    """
    try:
        return frame.select(pl.col(column.name).cast(FRAME_TYPES[column.kind]) for column in model.columns)
    except pl.exceptions.InvalidOperationError as error:
        raise SourceError(f"A value of {model.name} in ClickHouse does not fit its column: {error}") from None
