"""A watchdog for one connection: it frees a driver call that waits for a server which does not answer.

libpq waits for ever where nothing is unsent and the server's kernel is alive, whatever the TCP settings, and cancelling
from this side does not wake it. Shutting its socket down does, at once.
"""

import contextlib
import math
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator

POLL_SECONDS = 0.25
"""How often the watchdog looks at the clock."""

ANSWER_BYTES = 64 * 1024 * 1024
"""What a server may send in answer to a login, or to a statement that gives a few rows. libpq writes notices to standard
error, and takes any number of them.
"""

# Where `tcpi_bytes_received` is in Linux's struct tcp_info (linux/tcp.h).
_BYTES_RECEIVED = slice(128, 136)


class Watchdog:
    """Shuts a connection's socket down when a block takes longer than it may, or the server sends more.

    Attributes:
        has_acted: the connection was frozen or flooded, and is gone.
        was_flooded: the latter.
    """

    def __init__(self, find: Callable[[], socket.socket | None]) -> None:
        """`find`: gives a socket of the watchdog's own on the connection, while that is still being made."""
        self._find = find
        self._socket: socket.socket | None = None
        self._deadline: float | None = None
        self._most_bytes: float = math.inf
        self._over = threading.Event()
        self.has_acted = False
        self.was_flooded = False
        threading.Thread(target=self._watch, name="pg_exports watchdog", daemon=True).start()

    def keep(self, connection: socket.socket | None) -> None:
        """Watch this connection, which was made; None where it was not found among others."""
        self._find = lambda: None
        self._socket = connection

    @contextlib.contextmanager
    def limit(self, seconds: float, answer_bytes: float = ANSWER_BYTES) -> Iterator[None]:
        """Let the block take so many seconds, and the server send so many bytes (where the system counts them: on Linux)."""
        self._most_bytes = _received(self._socket) + answer_bytes
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def hang_up(self) -> bool:
        """End the connection, whatever it waits for. Whether it is known, so that this could be done."""
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        return self._socket is not None

    def close(self) -> None:
        """Watch no longer, and let go of the socket."""
        self._over.set()
        if self._socket:
            self._socket.close()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            deadline = self._deadline
            if deadline is None:
                continue
            found = self._socket or self._find()
            is_flooded = _received(found) > self._most_bytes
            if found and (is_flooded or time.monotonic() > deadline):
                self.was_flooded, self.has_acted = is_flooded, True
                with contextlib.suppress(OSError):
                    found.shutdown(socket.SHUT_RDWR)
                return
            if found is not self._socket and found:
                found.close()


def _received(connection: socket.socket | None) -> int:
    """The bytes that have come over a connection so far; 0 where that is not counted."""
    if connection is None or sys.platform != "linux":
        return 0
    with contextlib.suppress(OSError):
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.stop)
        return int.from_bytes(information[_BYTES_RECEIVED], sys.byteorder)
    return 0


def open_sockets() -> dict[tuple[int, int], int]:
    """This process's sockets: their descriptors by device and inode."""
    found: dict[tuple[int, int], int] = {}
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - names are all there is to a descriptor
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_dev, status.st_ino] = int(name)
    return found


def new_connection(before: Collection[tuple[int, int]], port: int) -> socket.socket | None:
    """A socket of the caller's own on the one connection to a port that was not there before; None where that is not sure.

    Args:
        before: the keys of `open_sockets` then.
        port: the port that the connection goes to.
    """
    sockets: list[socket.socket] = []
    for key, descriptor in open_sockets().items():
        if key not in before:
            with contextlib.suppress(OSError):
                sockets.append(socket.socket(fileno=os.dup(descriptor)))
    found = [candidate for candidate in sockets if _server_port(candidate) == port]
    chosen = found[0] if len(found) == 1 else None
    for candidate in sockets:
        if candidate is not chosen:
            candidate.close()
    return chosen


def _server_port(connection: socket.socket) -> int | None:
    with contextlib.suppress(OSError):
        address = connection.getpeername()
        return int(address[1]) if isinstance(address, tuple) else None
    return None
