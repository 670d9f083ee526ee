"""How the connection logs in: what it proves to the server, and what the server must prove before it hears anything.

With SCRAM the password is never sent, and the server proves that it knows it. A server that asks for the password itself, for
its md5 or for nothing proves nothing, so a connection has to allow that by name.
"""

from collections.abc import Mapping
from typing import Literal

from pg_exports.errors import SettingsError
from pg_exports.postgres.tls import VerifyServerIdentity

Authentication = Literal["scram-sha-256", "scram-sha-256-plus", "md5", "password", "none"]
"""What the server may ask for, in Postgres's words (pg_hba.conf, RFC 7677):

- `scram-sha-256`: a proof by SCRAM, bound to the TLS connection where the server can do so.
- `scram-sha-256-plus`: bound to it in any case. Nobody in between can relay it, whatever certificate he shows.
- `md5`: a hash of the password, too. Whoever has it can log in with it.
- `password`: the password itself, too, such as a token of IAM. Only to a server whose certificate and name are verified.
- `none`: nothing at all. The server lets the user in as pg_hba.conf's `trust` does.
"""

_REQUIRED: Mapping[Authentication, str] = {
    "scram-sha-256": "scram-sha-256",
    "scram-sha-256-plus": "scram-sha-256",
    "md5": "scram-sha-256,md5",
    "password": "scram-sha-256,md5,password",
    "none": "none",
}
"""libpq's `require_auth`. A server may ask for something better than what it need not."""


def libpq_settings(authentication: Authentication, verify: VerifyServerIdentity) -> dict[str, str]:
    """Libpq's settings for a login.

    Raises:
        SettingsError: the password would go to a server that has proved nothing.
    """
    if authentication == "password" and verify != "ca-and-hostname":
        raise SettingsError(
            "`authentication: password` (POSTGRES_AUTHENTICATION) sends the password itself, so the server must be known: "
            "set `verify_server_identity` (POSTGRES_VERIFY_SERVER_IDENTITY) to `ca-and-hostname`."
        )
    return {
        "require_auth": _REQUIRED[authentication],
        "channel_binding": "require" if authentication == "scram-sha-256-plus" else "prefer",
    }
