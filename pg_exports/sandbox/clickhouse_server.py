"""A process that serves ClickHouse's HTTP interface, with the real engine behind it.

`python -m pg_exports.sandbox.clickhouse_server --folder FOLDER --user USER --ready FILE`, with the password in the
environment variable PG_EXPORTS_SANDBOX_CLICKHOUSE_PASSWORD. Here are requests, answers and errors as ClickHouse 26
sends them. The engine is in `clickhouse_engine`; `clickhouse_process` starts and stops this process.
"""

import argparse
import asyncio
import base64
import binascii
import hmac
import json
import os
import secrets
import signal
import string
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

import pyarrow as pa
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from pg_exports.sandbox.clickhouse_engine import Answer, ClickHouseError, Engine, Statement
from pg_exports.sandbox.clickhouse_process import CREDENTIAL_VARIABLE

# The names that ClickHouse's HTTPHandler keeps for itself; every other URL parameter is a setting of the query.
TRANSPORT_PARAMETERS = frozenset(
    {"buffer_size", "client_protocol_version", "close_session", "compress", "database", "decompress", "default_format"}
    | {"password", "query", "query_id", "quota_key", "role", "session_check", "session_id", "session_timeout"}
    | {"stacktrace", "user", "wait_end_of_query"}
)

# ClickHouse's src/Server/HTTP/exceptionCodeToHTTPStatus.cpp; every other exception is a 500.
STATUS_OF_EXCEPTION = {
    name: status
    for status, names in {
        400: "BAD_ARGUMENTS CANNOT_COMPILE_REGEXP CANNOT_PARSE_TEXT CANNOT_PARSE_ESCAPE_SEQUENCE CANNOT_PARSE_NUMBER"
        " CANNOT_PARSE_QUOTED_STRING CANNOT_PARSE_DATE CANNOT_PARSE_DATETIME CANNOT_PARSE_DOMAIN_VALUE_FROM_STRING"
        " CANNOT_PARSE_IPV4 CANNOT_PARSE_IPV6 CANNOT_PARSE_INPUT_ASSERTION_FAILED CANNOT_PARSE_UUID DUPLICATE_COLUMN"
        " ILLEGAL_COLUMN UNKNOWN_ELEMENT_IN_AST UNKNOWN_TYPE_OF_AST_NODE THERE_IS_NO_COLUMN TOO_DEEP_AST TOO_BIG_AST"
        " UNEXPECTED_AST_STRUCTURE SYNTAX_ERROR INCORRECT_DATA TYPE_MISMATCH VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
        401: "REQUIRED_PASSWORD",
        403: "UNKNOWN_USER WRONG_PASSWORD AUTHENTICATION_FAILED SET_NON_GRANTED_ROLE ACCESS_DENIED",
        404: "UNKNOWN_TABLE UNKNOWN_FUNCTION UNKNOWN_IDENTIFIER UNKNOWN_TYPE UNKNOWN_STORAGE UNKNOWN_DATABASE"
        " UNKNOWN_SETTING UNKNOWN_DIRECTION_OF_SORTING UNKNOWN_AGGREGATE_FUNCTION UNKNOWN_FORMAT"
        " UNKNOWN_DATABASE_ENGINE UNKNOWN_TYPE_OF_QUERY UNKNOWN_ROLE",
        408: "TIMEOUT_EXCEEDED",
        411: "HTTP_LENGTH_REQUIRED",
        413: "QUERY_IS_TOO_LARGE",
        415: "UNSUPPORTED_MEDIA_TYPE",
        501: "NOT_IMPLEMENTED",
        503: "SOCKET_TIMEOUT CANNOT_OPEN_FILE CANNOT_SCHEDULE_TASK",
    }.items()
    for name in names.split()
}

CONTENT_TYPES = {
    "CSV": "text/csv; charset=UTF-8; header=absent",
    "JSON": "application/json; charset=UTF-8",
    "JSONCompact": "application/json; charset=UTF-8",
    "JSONEachRow": "application/x-ndjson; charset=UTF-8",
    "TabSeparated": "text/tab-separated-values; charset=UTF-8",
    "TSV": "text/tab-separated-values; charset=UTF-8",
}
CODECS = {"lz4": "lz4", "zstd": "zstd", "br": "brotli", "gzip": "gzip"}  # HTTP's name: Arrow's name
BYTES_A_SEND = 1 << 20
LONGEST_EXCEPTION_BYTES = 16 * 1024


@dataclass(frozen=True)
class Credentials:
    """The one user that the server knows."""

    user: str
    password: str

    def check(self, request: Request) -> None:
        """Raise ClickHouse's AUTHENTICATION_FAILED unless the request carries this user and password."""
        user, password = _credentials(request)
        right_user = hmac.compare_digest(user.encode(), self.user.encode())
        if not (hmac.compare_digest(password.encode(), self.password.encode()) and right_user):
            raise ClickHouseError(
                f"Code: 516. DB::Exception: {user}: Authentication failed: password is incorrect, "
                "or there is no user with such name. (AUTHENTICATION_FAILED)"
            )


def _credentials(request: Request) -> tuple[str, str]:
    headers, query = request.headers, request.query_params
    if "x-clickhouse-user" in headers or "x-clickhouse-key" in headers:
        return headers.get("x-clickhouse-user", "default"), headers.get("x-clickhouse-key", "")
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            user, _, password = base64.b64decode(encoded).decode().partition(":")
            return user, password
    return query.get("user", "default"), query.get("password", "")


class Server:
    """The HTTP interface of one engine, for one user."""

    def __init__(self, engine: Engine, credentials: Credentials) -> None:
        self._engine = engine
        self._credentials = credentials
        # The engine's calls block, and an answer keeps its thread until the client has read it.
        self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="query")

    def application(self) -> Starlette:
        """The paths that it answers."""
        return Starlette(routes=[Route("/ping", self.ping), Route("/", self.query, methods=["GET", "POST"])])

    async def ping(self, request: Request) -> Response:
        """Say that the server is there; needs no password."""
        return PlainTextResponse("Ok.\n")

    async def query(self, request: Request) -> Response:
        """Run the statement in the URL, the body or both."""
        if request.method == "GET" and not request.query_params:
            return PlainTextResponse("Ok.\n")
        query_id = request.query_params.get("query_id") or str(uuid.uuid4())
        headers = {
            "X-ClickHouse-Server-Display-Name": "sandbox",
            "X-ClickHouse-Query-Id": query_id,
            "X-ClickHouse-Timezone": self._engine.timezone,
        }
        try:
            self._credentials.check(request)
            statement = _statement(request, await request.body())
            if not statement.sql.strip():
                raise ClickHouseError("Code: 62. DB::Exception: Empty query. (SYNTAX_ERROR)")
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._engine.run, statement)
        except ClickHouseError as error:
            return self._error(error, headers)
        return StreamedAnswer(answer, headers, _codec(request), self._threads, self._engine.version)

    def _error(self, error: ClickHouseError, headers: Mapping[str, str]) -> Response:
        extra = {"X-ClickHouse-Exception-Code": str(error.code)}
        if error.name == "REQUIRED_PASSWORD":
            extra["WWW-Authenticate"] = 'Basic realm="ClickHouse server HTTP API"'
        status = STATUS_OF_EXCEPTION.get(error.name, 500)
        return PlainTextResponse(_exception_text(error, self._engine.version), status, {**headers, **extra})


def _exception_text(error: ClickHouseError, version: str) -> str:
    return f"{error.text} (version {version} (official build))\n"


def _statement(request: Request, body: bytes) -> Statement:
    parameters = dict(request.query_params)
    body = _decompress(body, request.headers.get("content-encoding", ""))
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        parameters.update(_form_fields(request.headers["content-type"], body))
        body = b""
    query = parameters.get("query", "").encode()
    settings = {
        name: value
        for name, value in parameters.items()
        if name not in TRANSPORT_PARAMETERS and not name.startswith("param_")
    }
    if request.method == "GET":
        settings["readonly"] = "2"
    return Statement(
        sql=query + b"\n" + body if query and body else query or body,
        database=request.headers.get("x-clickhouse-database") or parameters.get("database", ""),
        default_format=request.headers.get("x-clickhouse-format") or parameters.get("default_format") or "TabSeparated",
        parameters={name[6:]: value for name, value in parameters.items() if name.startswith("param_")},
        settings=settings,
        may_stream=parameters.get("wait_end_of_query", "0") != "1",
    )


def _form_fields(content_type: str, body: bytes) -> dict[str, str]:
    form = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    fields = {}
    for part in form.walk():
        name = part.get_param("name", header="content-disposition")
        if part.get_filename() is not None:
            raise ClickHouseError(
                f"Code: 48. DB::Exception: The sandbox has no external tables, and {name} is one. (NOT_IMPLEMENTED)"
            )
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            fields[name] = content.decode()
    return fields


def _decompress(body: bytes, encoding: str) -> bytes:
    if not body or encoding in ("", "identity"):
        return body
    if encoding not in CODECS:
        raise ClickHouseError(f"Code: 48. DB::Exception: Unknown compression method {encoding}. (NOT_IMPLEMENTED)")
    with pa.CompressedInputStream(pa.BufferReader(body), CODECS[encoding]) as stream:
        return bytes(stream.read())


def _codec(request: Request) -> str | None:
    if request.query_params.get("enable_http_compression") not in ("1", "true"):
        return None
    accepted = {part.split(";")[0].strip() for part in request.headers.get("accept-encoding", "").split(",")}
    return next((name for name in CODECS if name in accepted), None)


class StreamedAnswer(StreamingResponse):
    """Sends an answer's chunks as fast as the client reads them, and gives the engine's handle back in every case."""

    def __init__(
        self, answer: Answer, headers: Mapping[str, str], codec: str | None, threads: ThreadPoolExecutor, version: str
    ) -> None:
        self._answer = answer
        self._codec = codec
        self._threads = threads
        self._version = version
        self._exception_tag = "".join(secrets.choice(string.ascii_lowercase) for _ in range(16))
        self._client_is_gone = threading.Event()
        self._failed = False
        super().__init__(self._pieces(), headers={**headers, **self._own_headers()})

    def _own_headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": CONTENT_TYPES.get(self._answer.format or "", "application/octet-stream"),
            "X-ClickHouse-Summary": json.dumps(self._answer.summary),
            "X-ClickHouse-Exception-Tag": self._exception_tag,
        }
        if self._answer.format:
            headers["X-ClickHouse-Format"] = self._answer.format
        if self._codec:
            headers["Content-Encoding"] = self._codec
        return headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers, then piece by piece; each piece waits until the client has taken the one before."""
        loop = asyncio.get_running_loop()

        async def sent(message: Message) -> None:
            await send(message)

        def send_and_wait(message: Message) -> None:
            asyncio.run_coroutine_threadsafe(sent(message), loop).result()

        watch = loop.create_task(self._watch_for_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await loop.run_in_executor(self._threads, self._send_pieces, send_and_wait)
        finally:
            self._client_is_gone.set()
            watch.cancel()

    async def _watch_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_is_gone.set()

    def _send_pieces(self, send: Callable[[Message], None]) -> None:
        with closing(self._answer):
            for piece in self._pieces():
                if self._client_is_gone.is_set():
                    return
                send({"type": "http.response.body", "body": piece, "more_body": True})
        # Without the last chunk uvicorn breaks the connection off: so ClickHouse marks an answer that failed half-way.
        if not self._failed:
            send({"type": "http.response.body", "body": b"", "more_body": False})

    def _pieces(self) -> Iterator[bytes]:
        for chunk in _compressed(self._chunks(), self._codec):
            for start in range(0, len(chunk), BYTES_A_SEND):
                yield chunk[start : start + BYTES_A_SEND]

    def _chunks(self) -> Iterator[bytes]:
        try:
            yield from self._answer.chunks
        except ClickHouseError as error:
            self._failed = True
            yield _exception_block(_exception_text(error, self._version), self._exception_tag)


def _exception_block(text: str, tag: str) -> bytes:
    message = text.encode()[:LONGEST_EXCEPTION_BYTES]
    before, after = f"\r\n__exception__\r\n{tag}\r\n", f"{len(message)} {tag}\r\n__exception__\r\n"
    return before.encode() + message + after.encode()


def _compressed(chunks: Iterator[bytes], codec: str | None) -> Iterator[bytes]:
    if codec is None:
        yield from chunks
        return
    pipe = _Pipe()
    with pa.CompressedOutputStream(pa.PythonFile(pipe, mode="w"), CODECS[codec]) as compressor:
        for chunk in chunks:
            compressor.write(chunk)
            yield pipe.take()
    yield pipe.take()


class _Pipe:
    """A file that keeps what a compressor writes until it is asked for, and stays readable when that closes it."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> bytes:
        pieces, self._written = self._written, []
        return b"".join(pieces)


class _Listener(uvicorn.Server):
    """One port. The process has two, so the signals are its own business and not a port's."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _serve(application: Starlette, arguments: argparse.Namespace) -> None:
    """Serve until a signal, and one second longer for answers that are under way."""
    listeners = [_listener(application, arguments.port)]
    if arguments.certificate:
        listeners.append(_listener(application, arguments.https_port, arguments.certificate, arguments.key))
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    running = [asyncio.create_task(listener.serve()) for listener in listeners]
    while not all(listener.started for listener in listeners):
        await asyncio.sleep(0.01)
    ports = [listener.servers[0].sockets[0].getsockname()[1] for listener in listeners] + [None]
    ready = {"pid": os.getpid(), "http_port": ports[0], "https_port": ports[1]}
    _write_atomically(arguments.ready, json.dumps(ready))
    await ended.wait()
    for listener in listeners:
        listener.should_exit = True
    await asyncio.wait(running, timeout=1)


def _listener(application: Starlette, port: int, certificate: Path | None = None, key: Path | None = None) -> _Listener:
    config = uvicorn.Config(
        application,
        host="127.0.0.1",
        port=port,
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return _Listener(config)


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="clickhouse_server", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the data; one process at a time")
    parser.add_argument("--user", required=True)
    parser.add_argument("--certificate", type=Path, help="PEM; with it HTTPS is served too")
    parser.add_argument("--key", type=Path, help="PEM")
    parser.add_argument("--port", type=int, default=0, help="for HTTP; 0 takes a free one")
    parser.add_argument("--https-port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--ready", type=Path, required=True, help="JSON with pid and ports, written when all answer")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _arguments()
    credentials = Credentials(arguments.user, os.environ[CREDENTIAL_VARIABLE])
    # The engine takes its time zone from the process, and ClickHouse's servers run in UTC.
    os.environ["TZ"] = "UTC"
    time.tzset()
    engine = Engine(arguments.folder)
    asyncio.run(_serve_and_exit(engine, credentials, arguments))


async def _serve_and_exit(engine: Engine, credentials: Credentials, arguments: argparse.Namespace) -> None:
    await _serve(Server(engine, credentials).application(), arguments)
    closing_engine = threading.Thread(target=engine.close, daemon=True)
    closing_engine.start()
    closing_engine.join(timeout=2)
    # A thread that waits for a client or for the engine must not hold the process; MergeTree's parts survive this.
    os._exit(0)


if __name__ == "__main__":
    main()
