"""TLS towards Postgres: from "Verify server identity?" and a root certificate to libpq's settings.

Every setting that libpq would otherwise take from the home folder or the environment is given, so that a stray
`~/.postgresql/root.crt` or PGSSLMODE changes nothing.
"""

import contextlib
import os
import re
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pg_exports.errors import SettingsError

VerifyServerIdentity = Literal["no", "ca", "ca-and-hostname"]
"""`no` encrypts, `ca` also checks who signed the server's certificate, `ca-and-hostname` also whose name is in it."""

SYSTEM = "system"
"""The root certificate that stands for the operating system's authorities."""

SSL_MODES: Mapping[VerifyServerIdentity, str] = {"no": "require", "ca": "verify-ca", "ca-and-hostname": "verify-full"}
"""libpq's sslmode. `prefer` and `allow` fall back to plain text: they are not offered."""

# libpq takes no empty path for "none", and looks in the home folder where nothing is given; a missing file is none.
_NO_FILE = "/nonexistent/pg_exports"

# Where Debian, Red Hat and Alpine keep the bundle, for a Python that was built elsewhere and does not know.
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

_FIELD = "`root_certificate` (POSTGRES_ROOT_CERTIFICATE)"

# Of a file only these go to libpq: bundles have comments in any language, and a key has no business there.
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

# What is no path may be a secret that was pasted into the wrong field, and is never shown.
_PASTED = re.compile(r"\s*[A-Za-z0-9+/=\s]{64,}|.*\n.*", re.DOTALL)


@contextlib.contextmanager
def libpq_settings(verify: VerifyServerIdentity, root_certificate: str) -> Iterator[dict[str, str]]:
    """Libpq's settings for one connection attempt. A root certificate that is no PEM file lives in a file meanwhile.

    Args:
        verify: the answer to "Verify server identity?".
        root_certificate: `system`, a path to a PEM or DER file, or PEM text. Not read with `no`.

    Raises:
        SettingsError: the root certificate is missing, empty, or no certificate.
    """
    common = {
        "sslmode": SSL_MODES[verify],
        "sslcertmode": "disable",
        "sslkeylogfile": "",
        "sslsni": "1",
        "sslcrl": _NO_FILE,
        "sslcrldir": "",
        "sslnegotiation": "postgres",
        "ssl_min_protocol_version": "TLSv1.2",
        "ssl_max_protocol_version": "",
        # GSS encryption would come before TLS and skip the certificate.
        "gssencmode": "disable",
    }
    if verify == "no":
        # With any root certificate `require` verifies after all.
        yield common | {"sslrootcert": _NO_FILE}
    elif root_certificate == SYSTEM:
        yield common | {"sslrootcert": system_authorities()}
    else:
        with _file(as_pem(root_certificate)) as path:
            yield common | {"sslrootcert": path}


@contextlib.contextmanager
def _file(text: str) -> Iterator[str]:
    """The path of a file with a text; on Linux in memory, so that a process that is killed leaves none behind."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pg_exports"), "w") as file:
            file.write(text)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile("w", prefix="pg_exports_") as file:
            file.write(text)
            file.flush()
            yield file.name


def system_authorities() -> str:
    """Path of the operating system's bundle of authorities; the environment's SSL_CERT_FILE comes first.

    Raises:
        SettingsError: none was found.
    """
    for path in (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_BUNDLES):
        if path and Path(path).is_file():
            return path
    raise SettingsError(
        f"No system authorities were found on this machine. Install its ca-certificates package, or set {_FIELD} to "
        "the file of the authority that signed the server's certificate."
    )


def as_pem(root_certificate: str) -> str:
    """The PEM text of one or more certificates given as PEM text or as a path to a PEM or DER file.

    Raises:
        SettingsError: there is no such file, it is empty, or it holds no certificate. The text is never shown.
    """
    if "-----BEGIN" in root_certificate:
        return _checked(root_certificate.replace("\\n", "\n"), f"{_FIELD}: the PEM text")
    forms = "Give `system`, the path of a .crt, .pem, .cer or .ca-bundle file, or the PEM text itself."
    if not root_certificate.strip():
        raise SettingsError(f"{_FIELD} is empty. {forms}")
    if _PASTED.fullmatch(root_certificate):
        raise SettingsError(f"{_FIELD} is neither a path nor PEM text (-----BEGIN CERTIFICATE-----). {forms}")
    where = f"{_FIELD}: the file {root_certificate}"
    try:
        content = Path(root_certificate).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{where} cannot be read ({reason}). {forms}") from None
    if not content.strip():
        raise SettingsError(f"{where} is empty. It must hold the certificate of the authority, as PEM or DER.")
    if b"-----BEGIN" in content:
        return _checked(content.decode("utf-8-sig", errors="replace"), where)
    return _checked(ssl.DER_cert_to_PEM_cert(content), where)


def _checked(text: str, where: str) -> str:
    certificates = _CERTIFICATE.findall(text)
    damaged = [number for number, certificate in enumerate(certificates, start=1) if not _is_readable(certificate)]
    if len(damaged) == len(certificates):
        raise SettingsError(
            f"{where} holds no certificate. It must hold the certificate of the authority that signed the server's, "
            "as PEM (-----BEGIN CERTIFICATE-----) or DER; a private key is of no use here."
        )
    if damaged:
        raise SettingsError(f"{where} is damaged: its certificate number {damaged[0]} cannot be read. Fetch it anew.")
    return "\n".join([*certificates, ""])


def _is_readable(certificate: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError, TypeError):  # TypeError: not ASCII
        return False
    return True
