"""The configuration of the sandbox's ClickHouse server: its config.xml, and its users with their profiles, grants and quotas.

The wheel's server cannot store users made by CREATE USER, so all of them are in XML files that are written before it starts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from pg_exports.sandbox.files import write_private

HOST = "127.0.0.1"
"""The address on which servers listen."""

ADMINISTRATOR = "administrator"
"""The user who may do everything, and who fills the tables."""

NAMED_COLLECTION = "sandbox"
"""The named collection with the administrator's credentials: a dictionary reads its table with it."""

_CONFIG = """<clickhouse>
    <logger>
        <log>{folder}/clickhouse.log</log>
        <size>10M</size>
        <count>1</count>
    </logger>
    <log-level>error</log-level>
    <listen_host>127.0.0.1</listen_host>
    <http_port>0</http_port>
    <tcp_port>{tcp_port}</tcp_port>
    <users_config>users.xml</users_config>
    <query_log>
        <database>system</database>
        <table>query_log</table>
        <flush_interval_milliseconds>500</flush_interval_milliseconds>
    </query_log>
    <mark_cache_size>268435456</mark_cache_size>
    <named_collections>
        <{collection}>
            <user>{administrator}</user>
            <password>{password}</password>
        </{collection}>
    </named_collections>
</clickhouse>
"""

# The engine runs its own statements as `default`, who can have no password. So `default` may open the ports and no more, and
# has used up its quota once the server is ready: over the network it may do nothing (QUOTA_EXCEEDED).
_USERS = """<clickhouse>
    <profiles>
        <default>
            <allow_introspection_functions>0</allow_introspection_functions>
        </default>
        <start>
            <implicit_select>0</implicit_select>
            <storage_file_read_method>pread</storage_file_read_method>
        </start>
    </profiles>
    <quotas>
        <default/>
        <start>
            <interval>
                <duration>2147483647</duration>
                <queries>{statements}</queries>
            </interval>
        </start>
    </quotas>
    <users>
        <default>
            <password/>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>start</profile>
            <quota>start</quota>
            <grants>
                <query>GRANT SYSTEM LISTEN ON *.*</query>
                <query>GRANT CREATE TEMPORARY TABLE, FILE ON *.*</query>
            </grants>
        </default>
        <{administrator}>
            <password_sha256_hex>{password}</password_sha256_hex>
            <networks><ip>::/0</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
            <access_management>1</access_management>
            <named_collection_control>1</named_collection_control>
        </{administrator}>
    </users>
</clickhouse>
"""

# All in one file: with a file for each of 2,900 the server took 40 s to start, and so 23 s.
_FURTHER_USERS = """<clickhouse>
    <profiles>{profiles}</profiles>
    <quotas>{quotas}</quotas>
    <users>{users}</users>
</clickhouse>
"""

_USER = """
        <{name}>
            <password_sha256_hex>{password}</password_sha256_hex>
            <networks><ip>::/0</ip></networks>
            <profile>{name}</profile>
            <quota>{name}</quota>
            <grants>{grants}</grants>
        </{name}>"""


def _statements(folder: Path, *, tcp: bool) -> list[str]:
    """The statements that are the server's life: open the ports, write down which they are, and wait.

    The last one reads a FIFO, so it lasts until the process closes the FIFO's other end; then the engine shuts down.
    """
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    ports = "getServerPort('http_port'), " + ("getServerPort('tcp_port')" if tcp else "0")
    return [
        "SYSTEM START LISTEN HTTP",
        *(["SYSTEM START LISTEN TCP"] if tcp else []),
        f"SELECT {ports} INTO OUTFILE '{quoted}/ports' FORMAT TSV",
        f"SELECT count() FROM file('{quoted}/alive', LineAsString, 'line String') FORMAT Null",
    ]


@dataclass(frozen=True)
class ClickHouseUser:
    """A user with a profile and a quota of its own.

    Attributes:
        name: letters, digits and underscores.
        password: its password.
        grants: the GRANT statements, without TO.
        settings: of its profile.
        constraints: XML by setting, such as `{"limit": "<readonly/>"}`: what it may not change.
        queries_an_hour: its quota; None for none.
    """

    name: str
    password: str = field(repr=False)
    grants: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    constraints: Mapping[str, str] = field(default_factory=dict)
    queries_an_hour: int | None = None


def export_grants(*databases: str) -> tuple[str, ...]:
    """The README's grants of an export, for some databases; `test_*` stands for all whose names begin so."""
    return tuple(f"GRANT SELECT, SHOW DICTIONARIES, dictGet ON {database}.*" for database in databases)


def write(
    folder: Path,
    password: str,
    users: Sequence[ClickHouseUser],
    *,
    tcp_port: int | None = None,
    more: str = "",
) -> None:
    """Write the files that the server reads from `folder` when it starts.

    Args:
        folder: the server's.
        password: the administrator's.
        users: further users.
        tcp_port: of the native protocol; None if it is not to be served.
        more: a further configuration file, for example with `remote_servers`.
    """
    config = _CONFIG.format(
        folder=escape(str(folder)),
        tcp_port=tcp_port or 0,
        collection=NAMED_COLLECTION,
        administrator=ADMINISTRATOR,
        password=escape(password),
    )
    write_private(folder / "config.xml", config)
    statements = _statements(folder, tcp=tcp_port is not None)
    write_private(folder / "start.sql", ";\n".join(statements))
    # A SELECT without a table does not count to a quota.
    of_all = _USERS.format(statements=len(statements) - 1, administrator=ADMINISTRATOR, password=_hash(password))
    write_private(folder / "users.xml", of_all)
    for name in ("users.d", "config.d"):
        (folder / name).mkdir(exist_ok=True)
    further = _FURTHER_USERS.format(
        profiles="".join(map(_profile, users)), quotas="".join(map(_quota, users)), users="".join(map(_user, users))
    )
    write_private(folder / "users.d" / "further.xml", further)
    if more:
        write_private(folder / "config.d" / "more.xml", more)


def _profile(user: ClickHouseUser) -> str:
    settings = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in user.settings.items())
    limits = "".join(f"<{name}>{limits}</{name}>" for name, limits in user.constraints.items())
    constraints = f"<constraints>{limits}</constraints>" if limits else ""
    return f"<{user.name}>{settings}{constraints}</{user.name}>"


def _quota(user: ClickHouseUser) -> str:
    hour = f"<interval><duration>3600</duration><queries>{user.queries_an_hour}</queries></interval>"
    return f"<{user.name}>{'' if user.queries_an_hour is None else hour}</{user.name}>"


def _user(user: ClickHouseUser) -> str:
    grants = "".join(f"<query>{escape(grant)}</query>" for grant in user.grants)
    return _USER.format(name=user.name, password=_hash(user.password), grants=grants)


def _hash(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()
