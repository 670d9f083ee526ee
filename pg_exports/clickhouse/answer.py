"""The body of ClickHouse's answer. Its reader may pause for minutes.

ClickHouse closes the connection if the client reads nothing for 30 s (`http_send_timeout` of the server's default profile; no
query can change it). So this module reads a little ahead while the reader is busy, for example with a Postgres that refuses
rows one by one.
"""

import contextlib
import threading
import time
from collections import deque
from typing import Protocol

import urllib3

PATIENCE = 10.0
"""Seconds without a read after which `AHEAD_BYTES` are read ahead; the same again after each further `PATIENCE` seconds."""

AHEAD_BYTES = 2 * 1024 * 1024
"""Bytes to read ahead at a time. Both kernels buffer a few megabytes, and the sender's kernel wakes ClickHouse only when a
third of its buffer is free.
"""

MOST_AHEAD_BYTES = 128 * 1024 * 1024
"""Limit of the bytes that wait for the reader. It allows for a pause of ten minutes: as long as a run waits for a lock that
another run holds in Postgres.
"""


class Answer(Protocol):
    """An HTTP answer that can be given back before its end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...

    def shutdown(self) -> None:
        """End every read that is in progress."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Body:
    """An answer's body, which ends where the connection breaks: ClickHouse breaks it behind an exception's text.

    Attributes:
        longest_pause: seconds between two reads.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._ahead: deque[bytes] = deque()
        self._ahead_bytes = 0
        self._error: Exception | None = None
        self._has_ended = False
        self._is_closed = threading.Event()
        self._last_read = time.monotonic()
        self.longest_pause = 0.0
        threading.Thread(target=self._read_ahead, name="pg_exports answer", daemon=True).start()

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer only at the end. Raises what urllib3 raises, but for a connection that broke."""
        with self._lock:
            self.longest_pause = max(self.longest_pause, time.monotonic() - self._last_read)
            try:
                waiting = self._waiting(size)
                return waiting if len(waiting) == size else waiting + self._next(size - len(waiting))
            finally:
                self._last_read = time.monotonic()

    def close(self) -> None:
        """Give the answer back. Another thread may be reading from it: that one ends, too."""
        self._is_closed.set()
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._answer.shutdown()
        self._answer.close()

    def _waiting(self, size: int) -> bytes:
        """Up to so many of the bytes that were read ahead."""
        pieces, length = [], 0
        while self._ahead and length < size:
            piece = self._ahead.popleft()
            if length + len(piece) > size:
                self._ahead.appendleft(piece[size - length :])
                piece = piece[: size - length]
            pieces.append(piece)
            length += len(piece)
        self._ahead_bytes -= length
        if length < size and self._error:
            raise self._error
        return b"".join(pieces)

    def _next(self, size: int) -> bytes:
        if self._has_ended:
            return b""
        try:
            return self._answer.read(size)
        except urllib3.exceptions.ProtocolError as error:
            self._has_ended = True
            partial = getattr(error.args[-1], "partial", b"")
            return partial if isinstance(partial, bytes) else b""

    def _read_ahead(self) -> None:
        last = 0.0
        while not self._is_closed.wait(PATIENCE / 4):
            now = time.monotonic()
            if now - max(last, self._last_read) < PATIENCE or not self._lock.acquire(blocking=False):
                continue
            try:
                if self._ahead_bytes < MOST_AHEAD_BYTES and not self._is_closed.is_set():
                    data = self._next(AHEAD_BYTES)
                    if not data:
                        return
                    self._ahead.append(data)
                    self._ahead_bytes += len(data)
            except Exception as error:  # noqa: BLE001 - it is the reader's, and raised at its next read
                self._error = error
                return
            finally:
                self._lock.release()
            last = time.monotonic()
