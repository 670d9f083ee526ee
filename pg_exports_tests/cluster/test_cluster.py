"""The short version of `make cluster`: two workers, one of which is killed, with settings that are less patient."""

import shutil
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

pytest.importorskip("dagster_celery", reason="dagster-celery is not installed: `make cluster`")

from pg_exports.sandbox import Sandbox, source_tables
from pg_exports_tests.cluster import figures
from pg_exports_tests.cluster.deployment import LIMIT, Cluster, cluster
from pg_exports_tests.cluster.rows import fill
from pg_exports_tests.conftest import Target
from pg_exports_tests.faults import eventually, held_before_commit, with_own_postgres
from pg_exports_tests.ui.deployment import PATIENCE

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server: `make cluster`")

HOURS, CHUNK, ROWS = 5, 2, 1_000


@pytest.fixture(scope="module")
def running(sandbox: Sandbox, sample_end: datetime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    database = f"test_{uuid.uuid4().hex[:12]}"
    start = sample_end - timedelta(hours=HOURS)
    source_tables.create_tables(sandbox.execute, database)
    fill(sandbox, database, start, HOURS, ROWS)
    with (
        with_own_postgres(sandbox) as own,
        cluster(
            tmp_path_factory.mktemp("cluster"),
            own,
            "one",
            "two",
            start=start.isoformat(),
            chunk=CHUNK,
            seconds={"poll_interval_seconds": 2, "free_slots_after_run_end_seconds": 2},
            variables={
                "CLICKHOUSE_DATABASE": database,
                "PG_EXPORTS_LOST_AFTER": "4",
                "PG_EXPORTS_LOST_RUNS_INTERVAL": "2",
            },
        ) as started,
    ):
        yield started
    sandbox.execute(f"DROP DATABASE {database} SYNC")


def test_the_run_of_a_worker_that_is_killed_is_completed_by_another_one_and_each_row_lands_once(
    running: Cluster,
) -> None:
    deployment = running.deployment
    with figures.Samples(running) as samples:
        keys = list(deployment.partitions("events"))[:HOURS]
        # The first run makes the tables.
        deployment.wait(deployment.backfill("events", keys[:1]))
        with held_before_commit(Target(running.sandbox, "public")):
            backfill = deployment.backfill("events", keys[1:])
            eventually(lambda: running.transactions() == 2, PATIENCE)
            running.kill("one")
        deployment.wait(backfill)
    runs = deployment.runs(backfill)
    [recovery] = figures.recoveries(running, runs)
    assert (recovery.worker, recovery.status) == ("one", "FAILURE")
    assert (recovery.retry_worker, recovery.retry_status) == ("two", "SUCCESS")
    assert len(runs) == (HOURS - 1) // CHUNK + 1
    rows = figures.rows(running)
    assert rows.holds, rows
    assert rows.landed == HOURS * ROWS
    shown = deployment.partitions("events")
    assert all(shown[key] for key in keys)
    assert 0 < samples.connections <= LIMIT
    assert not samples.errors
