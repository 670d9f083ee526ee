"""Shared fixtures: one sandbox for the session; for each test a ClickHouse database and a Postgres schema of its own.

Exports run as the narrow role over verified TLS. The superuser, over a socket, looks at what landed; and is Dagster with its
storage, where a test is of something else.
"""

import contextlib
import copy
import functools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from clickhouse_connect.driver.client import Client

from pg_exports import ClickHouseResource, PostgresExport, PostgresIOManager, PostgresResource
from pg_exports.postgres import io_manager
from pg_exports.postgres.identifiers import quoted
from pg_exports.sandbox import Sandbox, postgres_server, sample_data, servers, source_tables
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import DATABASE, ROLE, SOURCE_DATABASE
from pg_exports_tests.clickhouse.users import SOURCE_DATABASES, USERS
from pg_exports_tests.yaml_exports import load  # noqa: F401 - a fixture

SAMPLE_HOURS = 30
SAMPLE_EVENTS = 3_000
TEAM = 1

LONGEST_OF_A_TEST = timedelta(seconds=60)
"""What a test that looks at the clock takes at most, on a busy machine."""

LONGEST = (
    "clickhouse.test_settings",
    "clickhouse.test_settings_of_shards",
    "ui.test_backfills",
    "cluster.test_cluster",
    "test_alerts",
    "test_connection_check",
    "test_streams",
    "cluster.test_lost_runs",
    "deploy.test_kubernetes_run",
    "deploy.test_requirements",
    "deploy.test_systemd",
    "test_ranges_together",
    "clickhouse.test_shard_settings",
    "clickhouse.test_cluster_faults",
    "clickhouse.test_cluster_sources",
    "test_bench_figures",
    "test_installed",
    "test_soak",
    "test_upgrade_without_registry",
    "test_concurrency",
    "test_faults_processes",
    "test_scaffold",
    "test_definitions",
    "test_backfill_command",
    "test_verify_command",
)
"""Modules that take long, many of them as they start processes: first, so that none is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules of `LONGEST` first, in its order; the others as they come."""

    def place(item: pytest.Item) -> int:
        module = item.nodeid.split(".py")[0].removeprefix("pg_exports_tests/").replace("/", ".")
        return LONGEST.index(module) if module in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Both servers, for the whole session. Exports have the README's grants and no others, in both."""
    running = servers.start(tmp_path_factory.mktemp("sandbox") / "servers", SOURCE_DATABASES, USERS)
    yield running
    servers.stop(running)


@pytest.fixture(autouse=True)
def retries_without_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as ever, with a tenth of a second between them."""
    monkeypatch.setattr(io_manager, "RETRIES", dg.RetryPolicy(max_retries=io_manager.RETRIES.max_retries, delay=0.1))


@dataclass(frozen=True)
class Source:
    """A ClickHouse database with PostHog's tables, which the administrator fills and exports read as `exporter`."""

    sandbox: Sandbox
    database: str

    @functools.cached_property
    def client(self) -> Client:
        """A client of this database. The session has one, of which this is a copy: to make one takes four requests."""
        client = copy.copy(self.sandbox.client)
        client.database = self.database
        return client

    def __getstate__(self) -> dict[str, object]:
        """Another process has a client of its own."""
        return {"sandbox": self.sandbox, "database": self.database}

    def execute(self, sql: str, parameters: Mapping[str, object] | None = None) -> None:
        """Run a statement in this database."""
        self.client.command(sql, dict(parameters or {}))

    def rows(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query in this database."""
        return [tuple(row) for row in self.client.query(sql, dict(parameters or {})).result_rows]

    def insert(self, table: str, *rows: Mapping[str, object]) -> None:
        """Insert rows that have the same columns."""
        self.client.insert(table, [list(row.values()) for row in rows], column_names=list(rows[0]))

    def columns_read(self, export: str) -> list[set[str]]:
        """The columns that each query of an export has read, oldest first, from ClickHouse's own log."""
        self.execute("SYSTEM FLUSH LOGS")
        rows = self.rows(
            "SELECT columns FROM system.query_log WHERE type = 'QueryFinish' AND has(databases, {database:String})"
            " AND JSONExtractString(log_comment, 'export') = {export:String} ORDER BY event_time_microseconds",
            {"database": self.database, "export": export},
        )
        return [{str(column).rpartition(".")[2] for column in columns} for (columns,) in rows]

    def resource(self, **changes: Any) -> ClickHouseResource:
        """The connection of an export to this database, over HTTPS with the certificate verified."""
        settings: dict[str, Any] = {
            "host": HOST,
            "port": self.sandbox.clickhouse.https_port,
            "user": ROLE,
            "password": self.sandbox.source_password,
            "database": self.database,
            "secure": True,
            "ca_certificate": str(self.sandbox.certificates.authority),
        }
        return ClickHouseResource(**(settings | changes))


@pytest.fixture
def source(sandbox: Sandbox) -> Iterator[Source]:
    """A database of the test's own, with empty tables."""
    database = f"test_{uuid.uuid4().hex[:12]}"
    source_tables.create_tables(sandbox.execute, database)
    yield Source(sandbox, database)
    sandbox.execute(f"DROP DATABASE {database} SYNC")


@pytest.fixture
def public(sandbox: Sandbox) -> Iterator[None]:
    """The schema that the shipped exports write to, for a test alone."""
    yield
    sandbox.postgres.execute("DROP SCHEMA public CASCADE", database=DATABASE)
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, "public")


@pytest.fixture(scope="session")
def sample_end() -> datetime:
    """End of the sample's last interval."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


@pytest.fixture(scope="session")
def sample(sandbox: Sandbox, sample_end: datetime) -> Source:
    """A database with sample data, shared: tests only read it."""
    source_tables.create_tables(sandbox.execute, SOURCE_DATABASE)
    sample_data.fill(sandbox.execute, SOURCE_DATABASE, end=sample_end, hours=SAMPLE_HOURS, events=SAMPLE_EVENTS)
    return Source(sandbox, SOURCE_DATABASE)


@dataclass(frozen=True)
class Target:
    """A Postgres schema in which the narrow role may create tables, and nothing else."""

    sandbox: Sandbox
    schema: str

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a query as the superuser, with the schema on the search path."""
        with (
            postgres_server.admin(self.sandbox.postgres, DATABASE) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f"SET search_path = {quoted(self.schema)}")
            cursor.execute(sql)
            return [tuple(row) for row in cursor.fetchall()]

    def execute(self, *statements: str) -> None:
        """Run statements as the superuser, with the schema on the search path."""
        with (
            postgres_server.admin(self.sandbox.postgres, DATABASE) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f"SET search_path = {quoted(self.schema)}")
            for statement in statements:
                cursor.execute(statement)

    def count(self, table: str) -> int:
        """Rows of a table."""
        [(rows,)] = self.rows(f"SELECT count(*) FROM {quoted(table)}")
        return int(rows)

    def resource(self, **changes: Any) -> PostgresResource:
        """The connection of an export, as the narrow role over TLS with certificate and host verified."""
        settings: dict[str, Any] = {
            "host": HOST,
            "port": self.sandbox.postgres.port,
            "user": ROLE,
            "password": self.sandbox.password,
            "database": DATABASE,
            "verify_server_identity": "ca-and-hostname",
            "root_certificate": str(self.sandbox.certificates.authority),
        }
        return PostgresResource(**(settings | changes))


@pytest.fixture
def target(sandbox: Sandbox) -> Iterator[Target]:
    """A schema of the test's own."""
    schema = f"test_{uuid.uuid4().hex[:12]}"
    postgres_server.grant_export(sandbox.postgres, ROLE, DATABASE, schema)
    yield Target(sandbox, schema)
    sandbox.postgres.execute(f"DROP SCHEMA {quoted(schema)} CASCADE", database=DATABASE)


@dataclass(frozen=True)
class Run:
    """How a run ended: its failure as a user reads it (None for success), and the metadata of each partition."""

    error: str | None
    metadata: dict[str, dict[str, Any]] = field(repr=False)
    log: list[str] = field(repr=False)
    events: list[dg.DagsterEvent] = field(repr=False)

    @property
    def tries(self) -> int:
        """How often the export was tried."""
        return 1 + sum(event.event_type is dg.DagsterEventType.STEP_UP_FOR_RETRY for event in self.events)

    @property
    def shown(self) -> list[str]:
        """The partitions that Dagster shows as materialised by the run, once for each event that says so."""
        return [str(event.partition) for event in self.events if event.is_step_materialization]

    @property
    def checks(self) -> dict[str, dg.AssetCheckEvaluation]:
        """What the export's own checks said, by name."""
        evaluations = [
            event.asset_check_evaluation_data
            for event in self.events
            if event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ]
        return {evaluation.check_name: evaluation for evaluation in evaluations}

    @property
    def reconciliation(self) -> dg.AssetCheckEvaluation:
        """What the one check said that blocks."""
        return self.checks["reconciliation"]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Rows inserted, updated and unchanged, over all partitions."""
        inserted, updated, unchanged = (
            sum(values[name] for values in self.metadata.values())
            for name in ("rows_inserted", "rows_updated", "rows_unchanged")
        )
        return inserted, updated, unchanged


def partition_key(moment: datetime) -> str:
    """The key of the hourly (or shorter) partition that begins at a moment."""
    return f"{moment.astimezone(UTC):%Y-%m-%d-%H:%M}"


def materialise(
    export: PostgresExport,
    clickhouse: ClickHouseResource,
    postgres: PostgresResource,
    first: str,
    last: str | None = None,
    *,
    downstream: Sequence[dg.AssetsDefinition] = (),
    run_config: Mapping[str, Any] | None = None,
) -> Run:
    """Run an export for one partition, or for a range in one run, in this process."""
    resources = {
        "clickhouse": clickhouse,
        "postgres": postgres,
        "postgres_io_manager": PostgresIOManager(postgres=postgres),
    }
    mine = dg.Definitions(resources=resources, assets=downstream, executor=dg.in_process_executor)
    job = dg.Definitions.merge(export.build_defs(None), mine).resolve_implicit_global_asset_job_def()
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last} if last else {}
    with _instance() as instance:
        result = job.execute_in_process(
            run_config=run_config,
            instance=instance,
            partition_key=None if last else first,
            tags=tags,
            raise_on_error=False,
        )
        entries = instance.all_logs(result.run_id)
    # The result's own events lack those that a failing step has logged itself.
    events = [entry.dagster_event for entry in entries if entry.dagster_event]
    metadata = {
        str(event.partition): {
            name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()
        }
        for event in events
        if event.is_step_materialization
    }
    failures = [event.step_failure_data for event in events if event.is_step_failure]
    return Run(_text(failures[0]) if failures else None, metadata, [entry.user_message for entry in entries], events)


@functools.cache
def _shared_instance() -> dg.DagsterInstance:
    """A Dagster instance without a server: to make one takes a third of a small run's time."""
    return dg.DagsterInstance.ephemeral()


def _instance() -> AbstractContextManager[dg.DagsterInstance]:
    """The shared one in the main thread; another thread has one of its own, as SQLite's connections are a thread's."""
    if threading.current_thread() is threading.main_thread():
        return contextlib.nullcontext(_shared_instance())
    return dg.DagsterInstance.ephemeral()


def _text(failure: Any) -> str:
    if failure.user_failure_data and failure.user_failure_data.description:
        return str(failure.user_failure_data.description)
    return str(failure.error.to_string() if failure.error else "")


RunExport = Callable[..., Run]


@pytest.fixture
def run(source: Source, target: Target) -> RunExport:
    """`run(export, first, last=None)`: from the test's own database into its own schema."""

    def run_export(export: PostgresExport, first: str, last: str | None = None, **options: Any) -> Run:
        clickhouse = options.pop("clickhouse", None) or source.resource()
        postgres = options.pop("postgres", None) or target.resource()
        return materialise(export, clickhouse, postgres, first, last, **options)

    return run_export


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return Path(__file__).parent.parent


@pytest.fixture
def hour() -> datetime:
    """Start of a recent hour: three hours before the one that it is. Where that one is about to end the test waits for
    the next, as what is late, over or today would change under it.
    """
    now = datetime.now(UTC)
    current = now.replace(minute=0, second=0, microsecond=0)
    left = current + timedelta(hours=1) - now
    if left < LONGEST_OF_A_TEST:
        time.sleep(left.total_seconds())
        current += timedelta(hours=1)
    return current - timedelta(hours=3)
