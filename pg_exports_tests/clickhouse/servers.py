"""ClickHouse clusters of several server processes, and databases whose rows are spread over their shards."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import clickhouse_connect
from clickhouse_connect.driver.client import Client

from pg_exports.sandbox import Sandbox, clickhouse_process
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports.sandbox.clickhouse_process import ClickHouseServer
from pg_exports.sandbox.servers import ROLE
from pg_exports.sandbox.source_tables import TABLES

SOURCES = [table for table in TABLES if table != "channel_definition"]
"""The tables that exports read."""

START_SECONDS = 300
"""Most time until a server answers that has thousands of users, on a busy machine."""

SECRET = "whole"
"""The cluster whose definition has a secret: shards are asked as the user who asks."""

AS_EXPORTER = "as_exporter"
"""The cluster without a secret: shards are asked as `exporter`, with its password."""

ALONE = "alone"
"""A cluster of the first server alone."""

UNREACHABLE = "unreachable"
"""A cluster of the first server and one on whose port nothing listens."""


@dataclass(frozen=True)
class Cluster:
    """Server processes that know each other. The first one is asked; each is a shard.

    Attributes:
        sandbox: a sandbox whose ClickHouse is the first server.
        servers: all of them, with their native ports.
        start: starts one of them, by its number, where it was.
    """

    sandbox: Sandbox
    servers: list[ClickHouseServer]
    start: Callable[[int], ClickHouseServer]

    def execute(self, sql: str, servers: Sequence[ClickHouseServer] | None = None) -> None:
        """Run a statement on each server as its administrator, by default on all."""
        for server in servers or self.servers:
            with administrator(server) as client:
                client.command(sql)

    def kill(self, number: int) -> None:
        """End a shard without a word to anybody."""
        os.kill(self.servers[number].pid, signal.SIGKILL)
        os.waitpid(self.servers[number].pid, 0)

    def start_again(self, number: int) -> None:
        """Start a shard that was killed, with the data that it had."""
        self.servers[number] = self.start(number)

    @contextlib.contextmanager
    def frozen(self, number: int) -> Iterator[None]:
        """A shard that keeps its connections and answers nothing, for the block."""
        os.kill(self.servers[number].pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.servers[number].pid, signal.SIGCONT)


@contextlib.contextmanager
def administrator(server: ClickHouseServer) -> Iterator[Client]:
    """A client of a server's administrator."""
    client = clickhouse_connect.get_client(
        host=server.host, port=server.http_port, username=server.user, password=server.password
    )
    with contextlib.closing(client):
        yield client


@contextlib.contextmanager
def cluster(
    sandbox: Sandbox,
    folder: Path,
    count: int,
    *,
    settings: Mapping[str, object] | None = None,
    users: Sequence[ClickHouseUser] = (),
    users_of_shards: Sequence[ClickHouseUser] = (),
    route: Callable[[int], int] = lambda port: port,
    more: str = "",
) -> Iterator[Cluster]:
    """A cluster for the block.

    Args:
        sandbox: its ClickHouse is replaced by the first server.
        folder: for the servers' files.
        count: of servers.
        settings: of `exporter`'s profile, on every server.
        users: further users; for each a cluster of its name asks the shards as that user, and one whose name ends with
            `_alone` consists of the last server only.
        users_of_shards: further users, who have their settings on every server but the one that is asked.
        route: gives the port through which a native port is reached by the others, such as a proxy's.
        more: further configuration, within `<clickhouse>`.
    """
    ports = [clickhouse_process.free_port() for _ in range(count)]
    routed = [route(port) for port in ports]
    everyone = (ClickHouseUser(ROLE, sandbox.source_password, export_grants("test_*"), settings or {}), *users)
    definitions = _cluster(SECRET, routed, "<secret>of the cluster</secret>")
    definitions += _cluster(AS_EXPORTER, routed, user=everyone[0])
    definitions += _cluster(ALONE, routed[:1], "<secret>of the cluster</secret>")
    definitions += _cluster(UNREACHABLE, [routed[0], 1], user=everyone[0])
    for user in users:
        definitions += _cluster(user.name, routed, user=user) + _cluster(f"{user.name}_alone", routed[-1:], user=user)
    config = f"<clickhouse><remote_servers>{definitions}</remote_servers>{more}</clickhouse>"

    def start(number: int) -> ClickHouseServer:
        others = users_of_shards if number else [dataclasses.replace(user, settings={}) for user in users_of_shards]
        return clickhouse_process.start(
            folder / f"shard_{number + 1}",
            password=sandbox.clickhouse.password,
            users=(*everyone, *others),
            certificate=sandbox.certificates.certificate,
            key=sandbox.certificates.key,
            tcp_port=ports[number],
            config=config,
            timeout=START_SECONDS,
        )

    with ThreadPoolExecutor(count) as pool:
        servers = list(pool.map(start, range(count)))
    running = Cluster(dataclasses.replace(sandbox, clickhouse=servers[0]), servers, start)
    try:
        yield running
    finally:
        for server in running.servers:
            clickhouse_process.stop(server)


def _cluster(name: str, ports: Sequence[int], secret: str = "", user: ClickHouseUser | None = None) -> str:
    credentials = f"<user>{user.name}</user><password>{user.password}</password>" if user else ""
    shards = "".join(
        f"<shard><replica><host>127.0.0.1</host><port>{port}</port>{credentials}</replica></shard>" for port in ports
    )
    return f"<{name}>{secret}{shards}</{name}>"


def distribute(cluster: Cluster, plain: str, local: str, tables: Sequence[str] = SOURCES) -> None:
    """Spread the rows of a database on the first server over all: each on one shard, every fifth on two, whatever the row
    is. `Distributed` tables over them are made by `over`.

    Args:
        cluster: the servers.
        plain: the database with the rows.
        local: the database of the local tables, which is made on each.
        tables: of the database.
    """
    cluster.execute(f"CREATE DATABASE {local}")
    shards = len(cluster.servers)
    first = cluster.servers[0]
    for table in tables:
        with administrator(first) as client:
            ddl = str(client.command(f"SHOW CREATE TABLE {plain}.{table}")).replace("\\n", "\n").replace("\\'", "'")
        cluster.execute(ddl.replace(f"CREATE TABLE {plain}.{table}", f"CREATE TABLE {local}.{table}", 1))
        cluster.execute(f"SYSTEM STOP MERGES {local}.{table}")
        for number, server in enumerate(cluster.servers):
            cluster.execute(
                f"INSERT INTO FUNCTION remote('127.0.0.1:{server.tcp_port}', '{local}', '{table}',"
                f" '{server.user}', '{server.password}') SELECT * FROM {plain}.{table}"
                f" WHERE _part_offset % {shards} = {number}"
                f" OR (_part_offset % 5 = 0 AND (_part_offset + 1) % {shards} = {number}) SETTINGS optimize_on_insert = 0",
                [first],
            )


def over(
    cluster: Cluster,
    name: str,
    plain: str,
    local: str,
    definition: str = SECRET,
    settings: str = "",
    tables: Sequence[str] = SOURCES,
) -> None:
    """A database on the first server with `Distributed` tables over the local ones, and the dictionary of channels.

    Args:
        cluster: the servers.
        name: of the database.
        plain: the database with the table of channels.
        local: the database of the local tables.
        definition: of the cluster, in `remote_servers`.
        settings: of the Distributed tables.
        tables: of the database.
    """
    first = [cluster.servers[0]]
    cluster.execute(f"CREATE DATABASE {name}", first)
    for table in tables:
        key = "cityHash64(team_id)" if table in SOURCES else "rand()"
        cluster.execute(
            f"CREATE TABLE {name}.{table} AS {local}.{table}"
            f" ENGINE = Distributed('{definition}', '{local}', '{table}', {key}) {settings}",
            first,
        )
    cluster.execute(
        f"CREATE DICTIONARY {name}.channel_definition_dict (domain String, kind String,"
        " domain_type Nullable(String), type_if_paid Nullable(String), type_if_organic Nullable(String))"
        f" PRIMARY KEY domain, kind SOURCE(CLICKHOUSE(NAME sandbox DB '{plain}' TABLE 'channel_definition'))"
        " LIFETIME(0) LAYOUT(COMPLEX_KEY_HASHED())",
        first,
    )
