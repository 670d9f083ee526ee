"""The certificate that a Postgres server shows, read by a TLS handshake of our own that verifies nothing.

libpq says no more of a certificate than that it refuses it. No login follows, and nothing that a user has set is sent;
whether the certificate is trusted is libpq's decision, by the settings of `tls`.
"""

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.x509 import DNSName, IPAddress, SubjectAlternativeName

from pg_exports.errors import DestinationError, PassingError, SettingsError, one_line

TIMEOUT = 15
"""Seconds for each of connecting, an answer, and the handshake."""

# "Message Formats" of Postgres's protocol: length 8, and a number that no version of the protocol has.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


@dataclass(frozen=True)
class ServerCertificate:
    """What a server shows to anybody who connects.

    Attributes:
        protocol, cipher: what both sides agreed upon, such as `TLSv1.3` and `TLS_AES_256_GCM_SHA384`.
        subject, issuer: as in RFC 4514, `CN=db.example.com,O=Example`; either may be empty.
        names: DNS names and addresses that the certificate is for.
        begins, expires: its validity, in UTC.
    """

    protocol: str
    cipher: str
    subject: str
    issuer: str
    names: tuple[str, ...]
    begins: datetime
    expires: datetime


def read(host: str, port: int) -> ServerCertificate:
    """Connect, ask for TLS as libpq does, read the certificate and hang up.

    Raises:
        SettingsError: `port` is none.
        DestinationError: what listens there speaks no TLS, or is no Postgres.
        PassingError: nothing answers.
    """
    address = f"{host}:{port}"
    with _connected(host, port) as connection:
        try:
            connection.sendall(_SSL_REQUEST)
            answer = connection.recv(1)
        except OSError as error:
            raise PassingError(
                f"Postgres at {address} does not answer: {error}\nIs `port` (POSTGRES_PORT) Postgres's?"
            ) from None
        if answer == b"N":
            raise DestinationError(
                f"Postgres at {address} does not support SSL.\npg_exports never connects without TLS. Turn it on in the "
                "server (ssl = on, with a certificate)."
            )
        if answer != b"S":
            raise DestinationError(
                f"What listens at {address} does not answer as Postgres does.\nCheck `host` and `port` (POSTGRES_HOST, "
                "POSTGRES_PORT)."
            )
        try:
            with _context().wrap_socket(connection, server_hostname=host) as encrypted:
                cipher, protocol, _ = encrypted.cipher() or ("", "", 0)
                certificate = x509.load_der_x509_certificate(encrypted.getpeercert(binary_form=True) or b"")
                return ServerCertificate(
                    protocol=encrypted.version() or protocol,
                    cipher=cipher,
                    subject=one_line(certificate.subject.rfc4514_string()),
                    issuer=one_line(certificate.issuer.rfc4514_string()),
                    names=_names(certificate),
                    begins=certificate.not_valid_before_utc,
                    expires=certificate.not_valid_after_utc,
                )
        except OSError as error:
            raise DestinationError(
                f"The TLS handshake with Postgres at {address} failed: {error}\nIt needs TLS 1.2 or newer."
            ) from None
        except ValueError as error:
            raise DestinationError(f"The certificate of Postgres at {address} cannot be read: {error}") from None


@contextlib.contextmanager
def _connected(host: str, port: int) -> Iterator[socket.socket]:
    # The system would take another port for one that is too great.
    if not 0 < port < 2**16:
        raise SettingsError(f"`port` (POSTGRES_PORT) is {port}. Set it to the server's port, 5432 by default.")
    try:
        connection = socket.create_connection((host, port), timeout=TIMEOUT)
    except (socket.gaierror, UnicodeError) as error:
        raise PassingError(f"The host {host} is not known: {error}\nCheck `host` (POSTGRES_HOST).") from None
    except OSError as error:
        raise PassingError(
            f"No connection to Postgres at {host}:{port}: {error}\nIs the server running, and are `host` and `port` "
            "(POSTGRES_HOST, POSTGRES_PORT) right?"
        ) from None
    with connection:
        yield connection


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Weak ones too: it is shown, whatever it is.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    found = (*names.get_values_for_type(DNSName), *map(str, names.get_values_for_type(IPAddress)))
    return tuple(map(one_line, found))
