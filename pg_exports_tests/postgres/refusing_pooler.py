"""A pooler between an export and Postgres that refuses in whatever words a test gives it, as poolers do that no sandbox has:
Supavisor, RDS Proxy, Neon's. It speaks TLS on both sides with the sandbox's certificate, and Postgres's own protocol.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST

_SSL_REQUEST = struct.pack("!II", 8, 80_877_103)
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class Refusal:
    """An ErrorResponse: SQLSTATE and message. A fatal one ends the connection."""

    state: str
    message: str
    is_fatal: bool = True

    @property
    def answer(self) -> bytes:
        """What goes over the wire; after an error that is not fatal, that the server is ready again."""
        severity = "FATAL" if self.is_fatal else "ERROR"
        fields = {"S": severity, "V": severity, "C": self.state, "M": self.message}
        body = b"".join(f"{name}{value}\0".encode() for name, value in fields.items())
        error = _message(b"E", body + b"\0")
        return error if self.is_fatal else error + _message(b"Z", b"I")


class RefusingPooler:
    """What a test does to it, at any moment, from any thread."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._server_port = sandbox.postgres.port
        certificates = sandbox.certificates
        self._as_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._as_server.load_cert_chain(certificates.certificate, certificates.key)
        self._as_client = ssl.create_default_context(cafile=certificates.authority)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.port = int(self._listener.getsockname()[1])
        """Where clients connect."""
        self.login: Refusal | None = None
        """How it answers who wants to log in; None for letting them."""
        self.statement: Refusal | None = None
        """How it answers the next statement of who is logged in, once."""
        self.refused = 0
        """Clients and statements that it has refused."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # ValueError: the test has closed it.
        with contextlib.suppress(OSError, ValueError):
            client.recv(len(_SSL_REQUEST), socket.MSG_WAITALL)
            client.sendall(b"S")
            client = self._as_server.wrap_socket(client, server_side=True)
            self._sockets.append(client)
            startup = client.recv(_CHUNK)
            if self.login:
                self.refused += 1
                client.sendall(self.login.answer)
                _end(client)
                return
            server = self._upstream()
            server.sendall(startup)
            with contextlib.suppress(OSError):
                self._relay(client, server)
            server.close()
            _end(client)

    def _upstream(self) -> ssl.SSLSocket:
        plain = socket.create_connection((HOST, self._server_port))
        plain.sendall(_SSL_REQUEST)
        plain.recv(1)
        server = self._as_client.wrap_socket(plain, server_hostname=HOST)
        self._sockets.append(server)
        return server

    def _relay(self, client: ssl.SSLSocket, server: ssl.SSLSocket) -> None:
        """In one thread: two may not read and write a TLS connection at the same time."""
        while True:
            waiting = [one for one in (client, server) if one.pending()]
            for one in waiting or select.select([client, server], [], [])[0]:
                received = one.recv(_CHUNK)
                if not received:
                    return
                if one is server:
                    client.sendall(received)
                elif self.statement is None:
                    server.sendall(received)
                else:
                    refusal, self.statement = self.statement, None
                    self.refused += 1
                    client.sendall(refusal.answer)
                    if refusal.is_fatal:
                        return


@contextlib.contextmanager
def refusing_pooler(sandbox: Sandbox) -> Iterator[RefusingPooler]:
    """A pooler for as long as the block lasts, which refuses nobody until it is told to."""
    pooler = RefusingPooler(sandbox)
    try:
        yield pooler
    finally:
        pooler.close()


def _end(client: ssl.SSLSocket) -> None:
    """End a connection as a server does that has spoken its last words: without a reset, which would swallow them."""
    with contextlib.suppress(OSError, ValueError):
        client.unwrap()
    client.close()


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body
