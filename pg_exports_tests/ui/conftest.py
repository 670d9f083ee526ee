"""One deployment for all tests of the UI: webserver and daemon, with a Postgres in which nobody else writes.

Its tables are made. Its schedules and sensors are stopped, so that only what a test asks for runs; tests keep apart by
the hours that they export.
"""

import uuid
from collections.abc import Iterator
from datetime import datetime

import pytest

from pg_exports.models import MODELS
from pg_exports.sandbox import Sandbox, source_tables
from pg_exports_tests.conftest import Source, Target, materialise, partition_key
from pg_exports_tests.faults import with_own_postgres
from pg_exports_tests.source_rows import HOUR, export_of
from pg_exports_tests.ui.deployment import Deployment, deployed


@pytest.fixture(scope="package")
def own_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with a Postgres in whose schema `public` nobody else writes."""
    with with_own_postgres(sandbox) as running:
        yield running


@pytest.fixture(scope="package")
def posthog(own_sandbox: Sandbox) -> Iterator[Source]:
    """The ClickHouse database that the deployment reads."""
    database = f"test_{uuid.uuid4().hex[:12]}"
    source_tables.create_tables(own_sandbox.execute, database)
    yield Source(own_sandbox, database)
    own_sandbox.execute(f"DROP DATABASE {database} SYNC")


@pytest.fixture(scope="package")
def landing(own_sandbox: Sandbox) -> Target:
    """Where the shipped exports write."""
    return Target(own_sandbox, "public")


@pytest.fixture(scope="package")
def deployment(
    own_sandbox: Sandbox,
    posthog: Source,
    landing: Target,
    sample_end: datetime,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """The repository's three exports, hourly."""
    empty = partition_key(sample_end - 30 * HOUR)
    for model in MODELS:
        export = export_of(model, landing, sample_end)
        assert materialise(export, posthog.resource(), landing.resource(), empty).error is None
    folder = tmp_path_factory.mktemp("deployment")
    with deployed(folder, own_sandbox, paused=True, CLICKHOUSE_DATABASE=posthog.database) as running:
        yield running
