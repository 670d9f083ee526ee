"""A host that is taken for Postgres and is none: it shows a certificate, asks for what it likes at login, and keeps what it is
sent. And one in between, which passes everything on to the real server.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator

from pg_exports.sandbox.certificates import Certificates

SSL_REQUEST = struct.pack("!II", 8, 80_877_103)
_CHUNK = 64 * 1024

CLEARTEXT = struct.pack("!cII", b"R", 8, 3)
"""AuthenticationCleartextPassword."""

MD5 = struct.pack("!cII4s", b"R", 12, 5, b"salt")
"""AuthenticationMD5Password."""

SCRAM = struct.pack("!cII", b"R", 8 + 15, 10) + b"SCRAM-SHA-256\0\0"
"""AuthenticationSASL, without a mechanism that is bound to the connection."""


def challenge(first: bytes, rounds: int) -> bytes:
    """AuthenticationSASLContinue, to a client's first message: the password is to be hashed so often."""
    text = b"r=%bx,s=c2FsdHNhbHRzYWx0c2E=,i=%d" % (first.split(b"r=")[1], rounds)
    return struct.pack("!cII", b"R", 8 + len(text), 11) + text


NOTICE = struct.pack("!cI", b"N", 4 + 3 + 1000 + 1) + b"SX\0" + b"M" + b"x" * 998 + b"\0" + b"\0"
"""NoticeResponse, of a thousand characters."""

NOTHING = struct.pack("!cII", b"R", 8, 0) + struct.pack("!cIc", b"Z", 5, b"I")
"""AuthenticationOk and ReadyForQuery."""


class HostileServer:
    """Listens until its block ends.

    Attributes:
        port: where it listens, on every address of this machine.
        startups: what clients said first, once TLS was up: their user and database.
        heard: all that they sent after that, decrypted.
    """

    def __init__(
        self,
        certificates: Certificates,
        asks_for: bytes,
        upstream: int | None = None,
        *,
        floods: bool = False,
        rounds: int | None = None,
    ) -> None:
        """`asks_for`: what is answered to a login. `upstream`: the port of the real server, to be in between. `floods`: send
        notices without an end after that. `rounds`: of the password's hash, after `SCRAM`.
        """
        self._rounds = rounds
        self._floods = floods
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.certificate, certificates.key)
        self._asks_for = asks_for
        self._upstream = upstream
        self._listener = socket.create_server(("", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.port = int(self._listener.getsockname()[1])
        self.startups: list[bytes] = []
        self.heard = b""
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
            client.recv(len(SSL_REQUEST), socket.MSG_WAITALL)
            client.sendall(b"S")
            encrypted = self._context.wrap_socket(client, server_side=True)
            self._sockets.append(encrypted)
            startup = encrypted.recv(_CHUNK)
            self.startups.append(startup)
            if self._upstream is None:
                encrypted.sendall(self._asks_for)
                while self._floods:
                    encrypted.sendall(NOTICE * 1000)
                while received := encrypted.recv(_CHUNK):
                    self.heard += received
                    if self._rounds:
                        encrypted.sendall(challenge(received, self._rounds))
                        self._rounds = None
            else:
                self._relay(encrypted, startup, self._upstream)

    def _relay(self, client: ssl.SSLSocket, startup: bytes, upstream: int) -> None:
        plain = socket.create_connection(("127.0.0.1", upstream))
        plain.sendall(SSL_REQUEST)
        plain.recv(1)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        server = context.wrap_socket(plain)
        self._sockets.append(server)
        server.sendall(startup)
        while True:
            waiting = [one for one in (client, server) if one.pending()]
            for one in waiting or select.select([client, server], [], [])[0]:
                received = one.recv(_CHUNK)
                if not received:
                    return
                if one is server:
                    client.sendall(received)
                else:
                    self.heard += received
                    server.sendall(received)


@contextlib.contextmanager
def hostile_server(
    certificates: Certificates,
    asks_for: bytes = b"",
    *,
    upstream: int | None = None,
    floods: bool = False,
    rounds: int | None = None,
) -> Iterator[HostileServer]:
    """Such a server for as long as the block lasts."""
    server = HostileServer(certificates, asks_for, upstream, floods=floods, rounds=rounds)
    try:
        yield server
    finally:
        server.close()
