"""A proxy between an export and Postgres that a test can cut, freeze and close at any moment, over real sockets.

It forwards bytes and reads none of them, so TLS goes through it with the server's own certificate: the host stays
`localhost`, only the port is the proxy's.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

CHUNK = 64 * 1024


class _Connection:
    """One client's connection, and the one to the server that was made for it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.sent = 0
        self.answered = 0
        self.flows = threading.Event()
        self.flows.set()
        self.has_client = True

    def cut(self) -> None:
        self.flows.set()
        _reset(self.client)
        _reset(self.server)

    def cut_client(self) -> None:
        self.has_client = False
        _reset(self.client)


class _Action:
    """What is done once, when so many bytes have come."""

    def __init__(self, bytes_: int, do: Callable[[], None]) -> None:
        self.bytes = bytes_
        self.do = do
        self.done = threading.Event()


class TcpProxy:
    """What a test does to the connections. Every method may be called at any moment, from any thread."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._actions: dict[str, _Action] = {}
        self.connections_made = 0
        """Connections that clients have made so far."""
        self.first_words: list[bytes] = []
        """The first eight bytes of each."""
        self.port = 0
        """Where clients connect."""
        self.accept()

    def cut(self) -> None:
        """Reset every connection, on both of its sides."""
        for connection in self._all():
            connection.cut()

    def cut_client(self) -> None:
        """Reset the clients' side of every connection. The server's side stays open and its answers are read and dropped,
        so that it finishes what it was told.
        """
        for connection in self._all():
            connection.cut_client()

    def freeze(self) -> None:
        """Forward nothing more, either way, on the connections that are there now, and keep them open without a word; the
        kernel goes on to acknowledge what it receives. A firewall that forgot them is like that: new ones pass.
        """
        for connection in self._all():
            connection.flows.clear()

    def thaw(self) -> None:
        """Forward what frozen connections have sent since, and what they send from now on."""
        for connection in self._all():
            connection.flows.set()

    def refuse(self) -> None:
        """Refuse new connections; those that are there stay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()

    def accept(self) -> None:
        """Accept new connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,))
        self._acceptor.start()

    def after(self, sent: int, action: Callable[[], None]) -> threading.Event:
        """Do something once, as soon as one client has sent so many bytes and before they are forwarded; gives an event
        that is set when it is done.
        """
        return self._plan("sent", _Action(sent, action))

    def after_answered(self, answered: int, action: Callable[[], None]) -> threading.Event:
        """The same as soon as the server has sent so many bytes on one connection."""
        return self._plan("answered", _Action(answered, action))

    def close(self) -> None:
        """Refuse new connections and cut what is there."""
        self.refuse()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _all(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections)

    def _accept(self, listener: socket.socket) -> None:
        # A window as small as a long way has: the client is to be kept waiting with bytes that it could not send.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream_port))
            except OSError:
                _reset(client)
                client.close()
                continue
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, server)
            thread = threading.Thread(target=self._forward, args=(connection,))
            with self._lock:
                self.connections_made += 1
                self._connections.append(connection)
                self._threads.append(thread)
            thread.start()

    def _forward(self, connection: _Connection) -> None:
        answers = threading.Thread(target=self._forward_answers, args=(connection,))
        answers.start()
        with contextlib.suppress(OSError):
            while data := connection.client.recv(CHUNK):
                if not connection.sent:
                    self.first_words.append(data[:8])
                connection.sent += len(data)
                self._act("sent", connection.sent)
                connection.flows.wait()
                connection.server.sendall(data)
        if connection.has_client:
            with contextlib.suppress(OSError):
                connection.flows.wait()
                connection.server.shutdown(socket.SHUT_WR)
        answers.join()
        with self._lock:
            self._connections.remove(connection)
        connection.client.close()
        connection.server.close()

    def _plan(self, counted: str, action: _Action) -> threading.Event:
        with self._lock:
            self._actions[counted] = action
        return action.done

    def _act(self, counted: str, bytes_: int) -> None:
        with self._lock:
            planned = self._actions.get(counted)
            due = planned if planned and planned.bytes <= bytes_ else None
            if due:
                del self._actions[counted]
        if due:
            due.do()
            due.done.set()

    def _forward_answers(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            while data := connection.server.recv(CHUNK):
                connection.answered += len(data)
                self._act("answered", connection.answered)
                connection.flows.wait()
                if connection.has_client:
                    with contextlib.suppress(OSError):
                        connection.client.sendall(data)
        connection.flows.wait()
        with contextlib.suppress(OSError):
            connection.client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def tcp_proxy(upstream_port: int) -> Iterator[TcpProxy]:
    """A proxy on a port of its own, for as long as the block lasts."""
    proxy = TcpProxy(upstream_port)
    try:
        yield proxy
    finally:
        proxy.close()


def _reset(side: socket.socket) -> None:
    """Close without a good-bye: what is under way is lost, and the other end is told so (RST)."""
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        side.shutdown(socket.SHUT_RDWR)
