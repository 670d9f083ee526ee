"""A proxy between an export and the sandbox's ClickHouse that spoils answers on their way, over real sockets.

Only answers in Arrow are spoilt; what the client asks before and after passes as it is.
"""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from enum import Enum

import pyarrow as pa
import urllib3


class End(Enum):
    """How an answer ends: as HTTP has it, cut off before the last chunk, or never."""

    CLEAN = "clean"
    ABRUPT = "abrupt"
    FROZEN = "frozen"


Spoil = Callable[[bytes], bytes]
"""What of a whole Arrow answer is sent. An answer that is sent whole ends as HTTP has it."""


def messages(answer: bytes) -> list[bytes]:
    """An Arrow stream's messages: the schema, then a batch each, without the end-of-stream marker."""
    return [message.serialize().to_pybytes() for message in pa.ipc.MessageReader.open_stream(answer)]


def first_messages(answer: bytes) -> bytes:
    """The schema and the first batch: cut between two messages."""
    return b"".join(messages(answer)[:2])


def half_a_message(answer: bytes) -> bytes:
    """The schema, the first batch and half of the next one."""
    return first_messages(answer) + messages(answer)[2][: len(messages(answer)[2]) // 2]


@contextlib.contextmanager
def faulty_proxy(upstream_port: int, spoil: Spoil, end: End) -> Iterator[int]:
    """A proxy on a port of its own, for as long as the block lasts. What `spoil` raises is raised at its end."""
    over = threading.Event()
    failures: list[Exception] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            address = f"http://127.0.0.1:{upstream_port}{self.path}"
            answer = urllib3.request("POST", address, body=body, headers=dict(self.headers), decode_content=False)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            is_arrow = answer.headers.get("X-ClickHouse-Format") == "ArrowStream"
            try:
                sent = spoil(answer.data) if is_arrow else answer.data
            except Exception as error:
                # Else the broken connection would pass for the fault.
                failures.append(error)
                raise
            self._send_chunk(sent)
            if sent != answer.data and end is not End.CLEAN:
                self.close_connection = True
                if end is End.FROZEN:
                    over.wait(60)
                return
            self.wfile.write(b"0\r\n\r\n")

        def _send_chunk(self, data: bytes) -> None:
            if data:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            over.set()
            server.shutdown()
            thread.join()
    if failures:
        raise failures[0]
