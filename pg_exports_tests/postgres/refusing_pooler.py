"""A pooler between an export and Postgres that refuses in whatever words a test gives it, as poolers do that no sandbox has:
Supavisor, RDS Proxy, Neon's. It speaks TLS on both sides with the sandbox's certificate, and Postgres's own protocol.
"""

import contextlib
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports_tests.postgres.listener import Listener, received


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


class RefusingPooler(Listener):
    """What a test does to it, at any moment, from any thread."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._server_port = sandbox.postgres.port
        self._as_client = ssl.create_default_context(cafile=sandbox.certificates.authority)
        self.login: Refusal | None = None
        """How it answers who wants to log in; None for letting them."""
        self.statement: Refusal | None = None
        """How it answers the next statement of who is logged in, once."""
        self.refused = 0
        """Clients and statements that it has refused."""
        super().__init__(sandbox.certificates)

    def speak(self, client: ssl.SSLSocket, startup: bytes) -> None:
        """Refuse the client, or let it talk to Postgres until it is refused."""
        if self.login:
            self.refused += 1
            client.sendall(self.login.answer)
            _end(client)
            return
        with contextlib.suppress(OSError), self.connect(self._server_port, self._as_client, HOST) as server:
            server.sendall(startup)
            self._relay(client, server)
        _end(client)

    def _relay(self, client: ssl.SSLSocket, server: ssl.SSLSocket) -> None:
        for sender, said in received(client, server):
            if sender is server:
                client.sendall(said)
            elif self.statement is None:
                server.sendall(said)
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
