"""The sandbox's certificate authority and the servers' certificates, made anew for each sandbox.

Only files are made here; the servers that use them live beside this module.
"""

from dataclasses import dataclass
from pathlib import Path

import trustme

HOST = "localhost"
"""The one name in the servers' certificates: 127.0.0.1 is the same machine under a name that they do not carry."""


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: the authority's certificate, the servers' certificate (with its chain) and key."""

    authority: Path
    certificate: Path
    key: Path


def issue(folder: Path) -> Certificates:
    """Make an authority and one server certificate for `localhost`, as PEM files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="pg_exports sandbox")
    server = authority.issue_cert(HOST)
    files = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority.cert_pem.write_to_path(str(files.authority))
    server.private_key_pem.write_to_path(str(files.key))
    files.key.chmod(0o600)
    for index, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(str(files.certificate), append=index > 0)
    return files
