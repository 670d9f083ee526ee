"""The process that is the sandbox's ClickHouse server: ClickHouse's own HTTP (and native) ports, and HTTPS before them.

It serves until SIGTERM or SIGINT. The engine cannot listen with TLS, so a relay in this process terminates it.
`clickhouse_config` writes what the folder must hold; `clickhouse_process` starts this file as a script, and stops it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

# By its file's folder, as the package would bring Dagster and Polars into this process: 190 MB of memory and a second.
if TYPE_CHECKING:
    from pg_exports.sandbox import clickhouse_engine
else:
    import clickhouse_engine

HOST = "127.0.0.1"
START_SECONDS = 300.0
STOP_SECONDS = 5.0
CHUNK_BYTES = 256 * 1024


def main() -> None:
    """Serve until a signal. Exit status 1 if the engine ended by itself, with its error on stderr."""
    arguments = _arguments()
    folder: Path = arguments.folder.absolute()
    certificate, key, ready = (
        path and path.absolute() for path in (arguments.certificate, arguments.key, arguments.ready)
    )
    for name in ("ports", "alive"):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "alive", 0o600)
    # The engine takes its time zone from the process.
    os.environ["TZ"] = "UTC"
    time.tzset()
    stops = {signal.SIGTERM, signal.SIGINT}
    # Blocked in the engine's threads, too, which inherit the mask: only `sigwait` gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    engine = _Engine(folder)
    alive = engine.start()
    if alive is None:
        _exit(engine)
        return
    http_port, tcp_port = (int(port) for port in (folder / "ports").read_text().split())
    https_port = _serve_https(http_port, certificate, key) if certificate else None
    listening = {"pid": os.getpid(), "http_port": http_port, "https_port": https_port, "tcp_port": tcp_port or None}
    _write_atomically(ready, json.dumps(listening))
    signal.sigwait(stops)
    os.close(alive)
    _cut_connections({http_port, tcp_port})
    engine.join(STOP_SECONDS)
    _exit(engine)


def _exit(engine: "_Engine") -> None:
    """End the process without waiting for threads: one that waits for a client must not hold it."""
    sys.stderr.write("".join(f"{error}\n" for error in engine.errors))
    sys.stderr.flush()
    os._exit(1 if engine.errors else 0)


@dataclass
class _Engine:
    """The engine in a thread of its own.

    Attributes:
        folder: the server's folder.
        errors: why it ended; none while it runs, and after a stop.
    """

    folder: Path
    errors: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> int | None:
        """Start it, and wait until its ports are open. The FIFO's writing end, or None if it ended before."""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._ended.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                return os.open(self.folder / "alive", os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.01)
        self.errors = self.errors or [f"ClickHouse did not open its ports within {START_SECONDS:.0f} s."]
        return None

    def join(self, seconds: float) -> None:
        """Wait until it has shut down."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            run = clickhouse_engine.load()(self.folder / "data")
            os.chdir(self.folder)
            run((self.folder / "start.sql").read_text())
        except Exception as error:  # noqa: BLE001 - whatever it is, the process ends with it
            self.errors.append(str(error))
        self._ended.set()
        # To that thread, as one of the engine's would take a signal to the process, and end it without a word.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _cut_connections(ports: set[int]) -> None:
    """Shut down the clients' connections: the engine would wait several seconds for each that is idle."""
    for descriptor in list(_descriptors()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            is_client = connection.family == socket.AF_INET and connection.getsockname()[1] in ports
            if is_client and connection.getpeername():
                connection.shutdown(socket.SHUT_RDWR)


def _descriptors() -> Iterator[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).exists():
            yield from (int(entry.name) for entry in list(Path(folder).iterdir()))
            return


def _serve_https(http_port: int, certificate: Path, key: Path) -> int:
    """Terminate TLS on a free port: what comes is passed on, decrypted, to the HTTP port. Returns the port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    listening = threading.Event()
    ports: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(HOST, http_port, limit=4 * CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        copies = [
            asyncio.ensure_future(_copy(reader, inner_writer)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
        ]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for copy in copies:
            copy.cancel()
        for end in (writer, inner_writer):
            with contextlib.suppress(Exception):
                end.close()

    async def serve() -> None:
        server = await asyncio.start_server(connected, HOST, 0, ssl=context, limit=4 * CHUNK_BYTES)
        ports.append(server.sockets[0].getsockname()[1])
        listening.set()
        async with server:
            await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    if not listening.wait(START_SECONDS):
        raise RuntimeError("The HTTPS port did not open.")
    return ports[0]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="clickhouse_server", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="the configuration and the data; one process at a time"
    )
    parser.add_argument("--ready", type=Path, required=True, help="JSON with pid and ports, written when all answer")
    parser.add_argument("--certificate", type=Path, help="PEM; with it HTTPS is served, too")
    parser.add_argument("--key", type=Path, help="PEM")
    return parser.parse_args()


if __name__ == "__main__":
    main()
