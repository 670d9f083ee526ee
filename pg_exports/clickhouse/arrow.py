"""An Arrow stream over HTTP as record batches, complete or an error.

A stream that stops between two messages reads like a shorter answer, so the end-of-stream marker decides: without it,
or with anything behind it, rows are missing.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Continuation marker and a message of length 0 (Arrow columnar format, "IPC streaming format")."""

TAIL_BYTES = 64 * 1024
"""Bytes kept of what was read last: an exception in mid-stream is text behind the last whole block."""

_EXCEPTION = re.compile(rb"Code: (\d+)\. DB::.*", re.DOTALL)


class ByteSource(Protocol):
    """An HTTP answer's body."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


class TruncatedStreamError(Exception):
    """The answer ended early or broke off. `text` is ClickHouse's own exception where it sent one, `code` its number."""

    def __init__(self, text: str | None, code: int | None) -> None:
        super().__init__(text or "the answer ended before its end-of-stream marker")
        self.text = text
        self.code = code


class _Tail:
    """A file-like object for Arrow's reader that remembers the last bytes that went through it."""

    closed = False

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._chunks: deque[bytes] = deque()
        self._kept = 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._chunks.append(data[-TAIL_BYTES:])
        self._kept += len(self._chunks[-1])
        while self._kept - len(self._chunks[0]) >= TAIL_BYTES:
            self._kept -= len(self._chunks.popleft())
        return data

    def close(self) -> None:
        """Arrow's reader closes its source when it goes; the answer is closed by who opened it."""

    @property
    def last_bytes(self) -> bytes:
        return b"".join(self._chunks)


def batches(source: ByteSource) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow stream, each with its text checked to be UTF-8.

    Raises:
        TruncatedStreamError: the stream did not end with its marker, or something came after it.
        pa.ArrowInvalid: a text is no UTF-8 (Polars would take it and panic later).
    """
    tail = _Tail(source)
    try:
        reader = pa.ipc.open_stream(tail)
        while (batch := _next(reader)) is not None:
            batch.validate(full=True)
            yield batch
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, pa.ArrowInvalid) and "UTF8" in str(error):
            raise
        raise _truncated(tail) from error
    if not tail.last_bytes.endswith(END_OF_STREAM) or tail.read(1):
        raise _truncated(tail)


def _next(reader: pa.RecordBatchReader) -> pa.RecordBatch | None:
    try:
        return reader.read_next_batch()
    except StopIteration:
        return None


def _truncated(tail: _Tail) -> TruncatedStreamError:
    while tail.read(TAIL_BYTES):
        pass
    match = _EXCEPTION.search(tail.last_bytes)
    if match is None:
        return TruncatedStreamError(None, None)
    text = match.group().decode(errors="replace").split("\r\n")[0].strip()
    return TruncatedStreamError(text, int(match.group(1)))
