"""A host that is taken for Postgres and is none: it shows a certificate, asks for what it likes at login, and keeps what it is
sent. And one in between, which passes everything on to the real server.
"""

import contextlib
import ssl
import struct
from collections.abc import Iterator

from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports_tests.postgres.listener import Listener, received

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


class HostileServer(Listener):
    """Such a server.

    Attributes:
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
        self._asks_for, self._upstream, self._floods, self._rounds = asks_for, upstream, floods, rounds
        self.startups: list[bytes] = []
        self.heard = b""
        super().__init__(certificates)

    def speak(self, client: ssl.SSLSocket, startup: bytes) -> None:
        """Answer as it was told to, or pass on what is said."""
        self.startups.append(startup)
        if self._upstream is not None:
            self._relay(client, startup, self._upstream)
            return
        client.sendall(self._asks_for)
        while self._floods:
            client.sendall(NOTICE * 1000)
        for _, said in received(client):
            self.heard += said
            if self._rounds:
                client.sendall(challenge(said, self._rounds))
                self._rounds = None

    def _relay(self, client: ssl.SSLSocket, startup: bytes, upstream: int) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self.connect(upstream, context, HOST) as server:
            server.sendall(startup)
            for sender, said in received(client, server):
                if sender is server:
                    client.sendall(said)
                else:
                    self.heard += said
                    server.sendall(said)


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
