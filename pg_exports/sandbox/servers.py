"""Both servers of a sandbox, the roles and databases in them, and the environment in which exports reach them."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import clickhouse_connect
from clickhouse_connect.driver.client import Client

from pg_exports.sandbox import certificates, clickhouse_process, postgres_server
from pg_exports.sandbox.certificates import HOST, Certificates
from pg_exports.sandbox.clickhouse_config import ClickHouseUser, export_grants
from pg_exports.sandbox.clickhouse_process import ClickHouseServer
from pg_exports.sandbox.files import write_private
from pg_exports.sandbox.postgres_server import PostgresServer

ROLE = "exporter"
DATABASE = "exports"
SOURCE_DATABASE = "posthog"
INSTANCE = "dagster"
"""The database of Dagster's instance storage, and the role that owns it."""


@dataclass(frozen=True)
class Sandbox:
    """Two running servers.

    Attributes:
        folder: certificates, ClickHouse's data, and `sandbox.json`, from which `load` reads all this again.
        certificates: the authority that signed both servers' certificate for `localhost`.
        clickhouse: with an administrator, who fills the tables; the sample data is in the database `posthog`.
        postgres: with the role `exporter`, who has the narrow grants of the README in the database `exports`, and no others.
        source_password: of ClickHouse's user `exporter`, who has the grants of the README and no others.
        password: of Postgres's role `exporter`.
        instance_password: of the role `dagster`.
    """

    folder: Path
    certificates: Certificates
    clickhouse: ClickHouseServer
    postgres: PostgresServer
    source_password: str
    password: str
    instance_password: str

    def environment(self) -> dict[str, str]:
        """The variables with which `defs/` and `dagster.yaml` reach this sandbox."""
        certificate = str(self.certificates.authority)
        instance = f"{INSTANCE}:{quote(self.instance_password, safe='')}@{HOST}:{self.postgres.port}/{INSTANCE}"
        return {
            "CLICKHOUSE_HOST": HOST,
            "CLICKHOUSE_PORT": str(self.clickhouse.https_port),
            "CLICKHOUSE_USER": ROLE,
            "CLICKHOUSE_PASSWORD": self.source_password,
            "CLICKHOUSE_DATABASE": SOURCE_DATABASE,
            "CLICKHOUSE_SECURE": "true",
            "CLICKHOUSE_CA_CERTIFICATE": certificate,
            "POSTGRES_HOST": HOST,
            "POSTGRES_PORT": str(self.postgres.port),
            "POSTGRES_USER": ROLE,
            "POSTGRES_PASSWORD": self.password,
            "POSTGRES_DATABASE": DATABASE,
            "POSTGRES_VERIFY_SERVER_IDENTITY": "ca-and-hostname",
            "POSTGRES_ROOT_CERTIFICATE": certificate,
            "DAGSTER_POSTGRES_URL": f"postgresql://{instance}?sslmode=verify-full&sslrootcert={quote(certificate)}",
            "PG_EXPORTS_TEAM_ID": "1",
        }

    def new_client(self, database: str = "default") -> Client:
        """A client of ClickHouse's administrator, over verified HTTPS. To make one takes four requests."""
        return clickhouse_connect.get_client(
            host=HOST,
            port=self.clickhouse.https_port,
            interface="https",
            username=self.clickhouse.user,
            password=self.clickhouse.password,
            database=database,
            ca_cert=str(self.certificates.authority),
            autogenerate_session_id=False,
        )

    @contextlib.contextmanager
    def clickhouse_client(self, database: str = "default") -> Iterator[Client]:
        """The same, for the block."""
        with contextlib.closing(self.new_client(database)) as client:
            yield client

    @property
    def client(self) -> Client:
        """The client that this process's statements share."""
        return _client(self)

    def execute(self, sql: str, parameters: Mapping[str, object] | None = None) -> None:
        """Run one ClickHouse statement, with `{name:Type}` parameters."""
        self.client.command(sql, dict(parameters or {}))

    @property
    def is_running(self) -> bool:
        """Whether both servers answer."""
        if not self.source_password:
            return False
        with contextlib.suppress(Exception), self.clickhouse_client() as client:
            return bool(client.ping()) and postgres_server.is_running(self.postgres)
        return False


@functools.cache
def _client(sandbox: Sandbox) -> Client:
    return sandbox.new_client()


def start(folder: Path, databases: Sequence[str] = (SOURCE_DATABASE,), users: Sequence[ClickHouseUser] = ()) -> Sandbox:
    """Start both servers, with empty databases. What was in the folder is gone.

    Args:
        folder: of the sandbox.
        databases: ClickHouse databases from which `exporter` may export; a name may end with `*`.
        users: further users of ClickHouse.

    Raises:
        PostgresSandboxError, ClickHouseStartError: a server did not come up; with the end of its log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    issued = certificates.issue(folder / "certificates")
    postgres = postgres_server.start(issued)
    source_password = postgres_server.new_password()
    try:
        clickhouse = clickhouse_process.start(
            folder / "clickhouse",
            password=postgres_server.new_password(),
            users=[ClickHouseUser(ROLE, source_password, export_grants(*databases)), *users],
            certificate=issued.certificate,
            key=issued.key,
        )
    except BaseException:
        postgres_server.stop(postgres)
        raise
    password, instance_password = postgres_server.new_password(), postgres_server.new_password()
    sandbox = Sandbox(folder, issued, clickhouse, postgres, source_password, password, instance_password)
    postgres_server.create_role(postgres, ROLE, password)
    postgres_server.create_role(postgres, INSTANCE, instance_password)
    postgres_server.create_database(postgres, DATABASE)
    postgres_server.create_database(postgres, INSTANCE, owner=INSTANCE)
    postgres_server.grant_export(postgres, ROLE, DATABASE)
    postgres_server.grant_export(postgres, INSTANCE, INSTANCE)
    _save(sandbox)
    return sandbox


def stop(sandbox: Sandbox) -> None:
    """Stop both servers and delete everything that they held."""
    clickhouse_process.stop(sandbox.clickhouse)
    postgres_server.stop(sandbox.postgres)
    shutil.rmtree(sandbox.folder, ignore_errors=True)


def load(folder: Path) -> Sandbox | None:
    """The sandbox that was started in the folder, running or not; None where there is none."""
    file = folder / "sandbox.json"
    if not file.exists():
        return None
    kept = json.loads(file.read_text())
    # Earlier versions kept less. Such a sandbox can be stopped, and counts as not running.
    clickhouse = {"tcp_port": None} | kept["clickhouse"] | {"folder": Path(kept["clickhouse"]["folder"])}
    postgres = {"binaries": postgres_server.find_binaries()} | kept["postgres"]
    return Sandbox(
        folder,
        Certificates(**{name: Path(value) for name, value in kept["certificates"].items()}),
        ClickHouseServer(**clickhouse),
        PostgresServer(
            postgres["host"],
            postgres["port"],
            Path(postgres["folder"]),
            Path(postgres["log"]),
            Path(postgres["binaries"]),
        ),
        kept.get("source_password", ""),
        kept["password"],
        kept["instance_password"],
    )


def _save(sandbox: Sandbox) -> None:
    kept = {
        "certificates": vars(sandbox.certificates),
        "clickhouse": vars(sandbox.clickhouse),
        "postgres": vars(sandbox.postgres),
        "source_password": sandbox.source_password,
        "password": sandbox.password,
        "instance_password": sandbox.instance_password,
    }
    write_private(sandbox.folder / "sandbox.json", json.dumps(kept, default=str, indent=2))
