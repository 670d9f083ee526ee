"""Receivers of alerts: a webhook and a mail server, each in a thread of the test's process."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from pg_exports.sandbox.certificates import HOST, Certificates


def server_context(certificates: Certificates) -> ssl.SSLContext:
    """TLS as a server with the sandbox's certificate for `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    return context


@dataclass
class WebhookReceiver:
    """What a webhook was sent, and how it answers: with HTTP 400 to a text that has `refuses` in it."""

    url: str
    status: int = 200
    refuses: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content_types: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """The texts of all requests."""
        assert all(body.keys() == {"text"} for body in self.bodies)
        return [body["text"] for body in self.bodies]

    def taken(self) -> list[str]:
        """The texts of the requests since the last time."""
        texts = self.texts
        self.bodies.clear()
        return texts


@contextlib.contextmanager
def webhook_receiver(path: str, certificates: Certificates | None = None) -> Iterator[WebhookReceiver]:
    """A webhook, over HTTPS where there are certificates."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.paths.append(self.path)
            receiver.content_types.append(self.headers["Content-Type"])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            receiver.bodies.append(body)
            self.send_response(400 if receiver.refuses and receiver.refuses in body["text"] else receiver.status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"the path was " + self.path.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    if certificates:
        server.socket = server_context(certificates).wrap_socket(server.socket, server_side=True)
    receiver = WebhookReceiver(f"{'https' if certificates else 'http'}://{HOST}:{server.server_port}{path}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class MailReceiver:
    """What a mail server was sent, and who may log in."""

    user: str
    password: str
    port: int
    envelopes: list[tuple[str | None, list[str]]] = field(default_factory=list)
    mails: list[EmailMessage] = field(default_factory=list)

    def authenticate(self, _server: SMTP, _session: Session, _envelope: Envelope, _how: str, said: Any) -> AuthResult:
        """Whether somebody may log in."""
        assert isinstance(said, LoginPassword)
        right = (said.login.decode(), said.password.decode()) == (self.user, self.password)
        return AuthResult(success=right, handled=False)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Take a mail."""
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self.envelopes.append((envelope.mail_from, envelope.rcpt_tos))
        self.mails.append(mail)
        return "250 OK"


@contextlib.contextmanager
def mail_receiver(
    certificates: Certificates, smtp_type: Literal["SSL", "STARTTLS"], user: str, password: str
) -> Iterator[MailReceiver]:
    """A mail server that wants TLS and a password."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    receiver = MailReceiver(user, password, port)
    context = server_context(certificates)
    tls: dict[str, Any] = (
        {"ssl_context": context, "auth_require_tls": False}
        if smtp_type == "SSL"
        else {"tls_context": context, "require_starttls": True}
    )
    controller = Controller(
        receiver, hostname=HOST, port=port, auth_required=True, authenticator=receiver.authenticate, **tls
    )
    controller.start()
    try:
        yield receiver
    finally:
        controller.stop()
