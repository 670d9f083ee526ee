"""What stands in Postgres's place, or before it: it takes connections, speaks TLS with a certificate, and hears who wants to
log in. What it answers is its subclass's.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from pg_exports.sandbox.certificates import Certificates

SSL_REQUEST = struct.pack("!II", 8, 80_877_103)
"""What a client says first where it wants TLS."""

CHUNK = 64 * 1024


class Listener(ABC):
    """Listens until it is closed.

    Attributes:
        port: where clients connect.
    """

    def __init__(self, certificates: Certificates) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.certificate, certificates.key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @abstractmethod
    def speak(self, client: ssl.SSLSocket, startup: bytes) -> None:
        """Talk to a client, which has said as whom it wants to log in. May raise OSError."""

    def close(self) -> None:
        """Hang up on everybody."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def connect(self, port: int, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        """A connection to a real server, over TLS; it ends with this one's."""
        plain = socket.create_connection((host, port))
        plain.sendall(SSL_REQUEST)
        plain.recv(1)
        server = context.wrap_socket(plain, server_hostname=host)
        self._sockets.append(server)
        return server

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
            self.speak(encrypted, encrypted.recv(CHUNK))


def received(*sides: ssl.SSLSocket) -> Iterator[tuple[ssl.SSLSocket, bytes]]:
    """Who says what, until one of them hangs up. In one thread: two may not read and write a TLS connection at once."""
    while True:
        waiting = [one for one in sides if one.pending()]
        for one in waiting or select.select(sides, [], [])[0]:
            said = one.recv(CHUNK)
            if not said:
                return
            yield one, said
