"""What stands in Postgres's place, or before it: it takes connections, speaks TLS with a certificate, and hears who wants to
log in. What it answers is its subclass's.
"""

import contextlib
import selectors
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
        self._lock = threading.Lock()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.port = int(self._listener.getsockname()[1])
        self._threads[0].start()

    @abstractmethod
    def speak(self, client: ssl.SSLSocket, startup: bytes) -> None:
        """Talk to a client, which has said as whom it wants to log in. May raise OSError, which ends its connection."""

    def close(self) -> None:
        """Hang up on everybody, and wait until every thread has seen it."""
        with self._lock:
            self._closed = True
            for one in (self._listener, *self._sockets):
                _hang_up(one)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def connect(self, port: int, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        """A connection to a real server, over TLS, for the caller to close. `close` hangs up on it too."""
        plain = socket.create_connection((host, port))
        plain.sendall(SSL_REQUEST)
        plain.recv(1)
        server = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
        self._track(server)
        server.do_handshake()
        return server

    def _track(self, one: socket.socket) -> None:
        """A connection that `close` hangs up on. Its own thread alone closes it: a descriptor that another thread closed could
        be the next connection's before this one reads from it again.
        """
        with self._lock:
            self._sockets.append(one)
            if self._closed:
                _hang_up(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._track(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                with self._lock:
                    self._threads.append(thread)
                    thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.recv(len(SSL_REQUEST), socket.MSG_WAITALL)
            client.sendall(b"S")
            with self._context.wrap_socket(client, server_side=True, do_handshake_on_connect=False) as encrypted:
                self._track(encrypted)
                encrypted.do_handshake()
                self.speak(encrypted, encrypted.recv(CHUNK))


def _hang_up(one: socket.socket) -> None:
    # Not `SSLSocket.shutdown`, which has the thread that reads go on without TLS.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(one, socket.SHUT_RDWR)


def received(*sides: ssl.SSLSocket) -> Iterator[tuple[ssl.SSLSocket, bytes]]:
    """Who says what, until one of them hangs up. In one thread: two may not read and write a TLS connection at once."""
    # Not `select`, which takes no descriptor from 1024 on: a process of many tests has as many.
    with selectors.DefaultSelector() as selector:
        for side in sides:
            selector.register(side, selectors.EVENT_READ, side)
        while True:
            waiting = [one for one in sides if one.pending()]
            for one in waiting or [key.data for key, _ in selector.select()]:
                said = one.recv(CHUNK)
                if not said:
                    return
                yield one, said
