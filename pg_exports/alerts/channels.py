"""Where alerts go: a webhook, mail. An error says why an alert was not taken, and shows neither address nor password.

What an alert says, and when, is `watch`'s and `component`'s business.
"""

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from email.message import EmailMessage
from email.policy import SMTP
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from smtplib import SMTPException, SMTPResponseException
from typing import Annotated, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

import dagster as dg
from dagster._utils.alert import send_email_via_ssl, send_email_via_starttls
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from pg_exports.component import as_written
from pg_exports.errors import PassingError, printable

TIMEOUT = 10
"""Seconds to wait for a connection, and for each answer. Dagster ends a sensor's tick after 60."""


_OF_THE_ALERT = (400, 413, 422)
"""Bad Request, Content Too Large, Unprocessable Content (RFC 9110): another alert may be taken."""


class RefusedAlertError(PassingError):
    """A receiver does not take this alert, whose words or length it does not like. It may take others."""


class Alert(BaseModel):
    """What is said of one export.

    Attributes:
        title: which export, and what is wrong with it, in one line.
        text: why.
        link: where to look: an address of Dagster's UI, or a run's id.
    """

    title: str
    text: str
    link: str


class Channel(Protocol):
    """A way to send alerts."""

    def send(self, alert: Alert) -> None:
        """Send an alert.

        Raises:
            PassingError: it was not taken; with the reason.
        """


class Webhook(BaseModel):
    """An address that takes Slack's JSON. Who knows it can post to it."""

    url: SecretStr

    def send(self, alert: Alert) -> None:
        """Post an alert as `{"text": ...}`. Redirects are not followed: they would take the text to somebody else.

        Raises:
            PassingError: the receiver does not answer, or not with a status from 200 to 299.
            RefusedAlertError: it answers that this alert is not what it takes.
        """
        text = _escaped("\n".join(part for part in (alert.title, alert.text, alert.link) if part))
        try:
            status = self._post(json.dumps({"text": text}))
        except (OSError, HTTPException) as error:
            raise PassingError(
                f"The alerts' `webhook` does not answer: {_reason(error)}. Check its address, and the way to it."
            ) from None
        if 300 <= status < 400:
            raise PassingError(
                f"The alerts' `webhook` answers with a redirect (HTTP {status}), which is not followed. Set it to the "
                "address that the redirect leads to."
            )
        if not 200 <= status < 300:
            if status in _OF_THE_ALERT:
                raise RefusedAlertError(
                    f"The alerts' `webhook` answers HTTP {status} to this alert: it does not take its words, or its length."
                )
            raise PassingError(
                f"The alerts' `webhook` answers HTTP {status}. From 400 to 499 its address is wrong or no longer valid; "
                "else the receiver has a fault."
            )

    def _post(self, body: str) -> int:
        """The answer's status. Its text is not read: the address may be in it. (urllib3 would log the address.)"""
        url = urlsplit(self.url.get_secret_value())
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=TIMEOUT)
        try:
            target = urlunsplit(("", "", url.path or "/", url.query, ""))
            connection.request("POST", target, body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()


class Email(dg.Resolvable, BaseModel):
    """A mail server, the account that sends, and who is to receive."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    sender: str = Field(alias="from", description="Address that alerts come from.")
    to: list[str] = Field(description="Addresses that alerts go to.")
    password: Annotated[SecretStr, dg.Resolver(as_written, model_field_type=str)] = Field(
        description="Password of smtp_user."
    )
    smtp_host: str = Field(description="The mail server's name, which must be in its certificate.")
    smtp_type: Literal["SSL", "STARTTLS"] = Field(default="SSL", description="How the connection is encrypted.")
    smtp_port: int | None = Field(default=None, description="465 for SSL, 587 for STARTTLS by default.")
    smtp_user: str | None = Field(default=None, description="Whom to log in as; `from` by default.")

    @field_validator("sender", "to")
    @classmethod
    def _is_address(cls, value: str | list[str]) -> str | list[str]:
        addresses = [value] if isinstance(value, str) else value
        if not addresses or not all("@" in address and address.isprintable() for address in addresses):
            raise ValueError("must be an e-mail address" if isinstance(value, str) else "must be e-mail addresses")
        return value

    def send(self, alert: Alert) -> None:
        """Send an alert as plain text, over verified TLS.

        Raises:
            PassingError: the mail server does not answer, or refuses.
        """
        # Dagster's own sensor, make_email_on_run_failure_sensor, sends a mail for each failed run: it cannot keep to one a
        # day. So only what it sends with is used.
        send = send_email_via_ssl if self.smtp_type == "SSL" else send_email_via_starttls
        port = self.smtp_port or (465 if self.smtp_type == "SSL" else 587)
        password = self.password.get_secret_value()
        user = self.smtp_user or self.sender
        try:
            with _default_timeout():
                send(self.sender, password, self.to, _mail(self.sender, self.to, alert), self.smtp_host, port, user)
        except (SMTPException, OSError) as error:
            reason = _reason(error).replace(password, "...") if password else _reason(error)
            raise PassingError(
                f"The alerts' mail server {self.smtp_host}:{port} does not take the mail ({self.smtp_type}): {reason}. "
                "Check the attributes of `email`."
            ) from None


def _mail(sender: str, to: Sequence[str], alert: Alert) -> str:
    # Dagster's helper encodes it as ASCII, which an error's words need not be.
    mail = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
    # A subject is one line.
    subject = " ".join(printable(alert.title).split())
    mail["From"], mail["To"], mail["Subject"] = sender, ", ".join(to), subject
    mail.set_content(printable("\n\n".join(part for part in (alert.text, alert.link) if part)))
    return mail.as_string()


@contextlib.contextmanager
def _default_timeout() -> Iterator[None]:
    """A timeout for connections that are made with none, as Dagster's helpers make them."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _escaped(text: str) -> str:
    """The text as Slack wants it, so that nothing in it is a link or a mention."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _reason(error: BaseException) -> str:
    """Why nothing was sent, in the words of the mail server or the operating system."""
    if isinstance(error, SMTPResponseException):
        said = error.smtp_error.decode(errors="replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        return f"{error.smtp_code} {said}"
    if isinstance(error, SMTPException):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"timed out after {TIMEOUT} s"
    # Other exceptions' words could have the address in them.
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
