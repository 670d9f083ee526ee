"""TLS towards Postgres: from "Verify server identity?" and a root certificate to libpq's settings.

Every setting that libpq would otherwise take from the home folder or the environment is given, so that a stray
`~/.postgresql/root.crt` or PGSSLMODE changes nothing.
"""

import contextlib
import os
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
        "sslcrl": _NO_FILE,
        # GSS encryption would come before TLS and skip the certificate.
        "gssencmode": "disable",
    }
    if verify == "no":
        # With any root certificate `require` verifies after all.
        yield common | {"sslrootcert": _NO_FILE}
    elif root_certificate == SYSTEM:
        yield common | {"sslrootcert": system_authorities()}
    else:
        with tempfile.TemporaryDirectory(prefix="pg_exports_") as folder:
            path = Path(folder) / "root.crt"
            path.write_text(as_pem(root_certificate))
            yield common | {"sslrootcert": str(path)}


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
    where = f"{_FIELD}: the file {root_certificate}"
    try:
        content = Path(root_certificate).expanduser().read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{where} cannot be read ({error.strerror}). Give `system`, the path of a .crt, .pem, .cer or .ca-bundle "
            "file, or the PEM text itself."
        ) from None
    if not content.strip():
        raise SettingsError(f"{where} is empty. It must hold the certificate of the authority, as PEM or DER.")
    if b"-----BEGIN" in content:
        return _checked(content.decode("utf-8-sig", errors="replace"), where)
    return _checked(ssl.DER_cert_to_PEM_cert(content), where)


def _checked(pem: str, where: str) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLError, ValueError):
        context.load_verify_locations(cadata=pem)
    if not context.get_ca_certs() and not context.cert_store_stats()["x509"]:
        raise SettingsError(
            f"{where} holds no certificate. It must hold the certificate of the authority that signed the server's, "
            "as PEM (-----BEGIN CERTIFICATE-----) or DER; a private key is of no use here."
        )
    return pem
