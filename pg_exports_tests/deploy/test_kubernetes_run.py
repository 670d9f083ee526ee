"""A run as Kubernetes runs it: Dagster's run launcher sends a Job, made from the values, and a node starts its command.

Node and API are `node`'s; launcher, Job, command, environment and both databases are the real ones.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes_validate
import pytest
from dagster._core.code_pointer import CodePointer
from dagster._core.definitions.reconstruct import reconstruct_repository_def_from_pointer
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.origin import DEFAULT_DAGSTER_ENTRY_POINT, JobPythonOrigin, RepositoryPythonOrigin
from dagster._daemon.monitoring.run_monitoring import monitor_started_run
from dagster_shared.yaml_utils import safe_load_yaml

from pg_exports.sandbox import Sandbox
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.servers import INSTANCE
from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.deploy import chart
from pg_exports_tests.deploy.node import Node, node
from pg_exports_tests.deploy.test_kubernetes import FOLDER, LAUNCHER, OTHER_PODS, VERSIONS, changed
from pg_exports_tests.faults import eventually
from pg_exports_tests.source_rows import event

pytestmark = pytest.mark.slow

DEFINITIONS = """
import dagster as dg

from pg_exports import PostgresExport
from pg_exports.defs.resources import connections


@dg.definitions
def defs() -> dg.Definitions:
    export = PostgresExport(model="events", team_id=1, start="{start:%Y-%m-%d}", schema="{schema}")
    return dg.Definitions.merge(export.build_defs(None), connections())
"""

ROWS = 250


@dataclass(frozen=True)
class Cluster:
    """A node, the instance that sends Jobs to it, and the one export that there is."""

    node: Node
    instance: dg.DagsterInstance
    export: Path

    def launch(self, partition: str, **tags: str) -> tuple[dg.DagsterRun, str]:
        """Launch a run of the export, with further tags; the run, and its Job's name."""
        pointer = CodePointer.from_python_file(str(self.export), "defs", str(self.export.parent))
        job = reconstruct_repository_def_from_pointer(pointer).get_job("events_job")
        origin = RepositoryPythonOrigin(
            executable_path=sys.executable,
            code_pointer=pointer,
            container_image="registry.example.com/pg-exports:0.1.0",
            entry_point=DEFAULT_DAGSTER_ENTRY_POINT,
        )
        run = self.instance.create_run_for_job(
            job, tags={"dagster/partition": partition, **tags}, job_code_origin=JobPythonOrigin("events_job", origin)
        )
        self.instance.run_launcher.launch_run(LaunchRunContext(run, None))
        return run, f"dagster-run-{run.run_id}"

    def state(self, run: dg.DagsterRun) -> dg.DagsterRun:
        """A run as it is now."""
        found = self.instance.get_run_by_id(run.run_id)
        assert found
        return found


def of_manifest(name: str, environment: dict[str, str]) -> dict[str, str]:
    """The data of a ConfigMap or Secret of the repository, with the sandbox's values where it has some."""
    for file in ("settings.yaml", "secrets.yaml"):
        for manifest in map(safe_load_yaml, (FOLDER / file).read_text().split("\n---\n")):
            if manifest["metadata"]["name"] == name:
                data = manifest.get("data") or manifest["stringData"]
                return {key: environment.get(key, value) for key, value in data.items()}
    raise AssertionError(name)


@pytest.fixture
def cluster(
    sandbox: Sandbox, source: Source, target: Target, hour: datetime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    environment = sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", sandbox.instance_password)
    export = tmp_path / "one_export.py"
    export.write_text(DEFINITIONS.format(start=hour - timedelta(days=1), schema=target.schema))
    objects = {name: of_manifest(name, environment) for name in ("pg-exports-settings", "pg-exports-passwords")}
    objects["pg-exports-storage"] = {"postgresql-password": sandbox.instance_password}
    with node(tmp_path, objects) as running:
        (tmp_path / "dagster.yaml").write_text(chart.as_yaml(values_for(sandbox, running)))
        with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
            yield Cluster(running, instance, export)


def values_for(sandbox: Sandbox, running: Node) -> dict[str, Any]:
    """The values with the sandbox's Postgres as Dagster's storage, and the node's address where a pod has Kubernetes's."""
    values = chart.read(FOLDER / "values.yaml")
    storage = {
        "postgresqlHost": HOST,
        "postgresqlUsername": INSTANCE,
        "postgresqlDatabase": INSTANCE,
        "postgresqlParams": {"sslmode": "verify-full", "sslrootcert": str(sandbox.certificates.authority)},
        "service": {"port": sandbox.postgres.port},
    }
    values["postgresql"] |= storage
    values = changed(values, f"{LAUNCHER}/load_incluster_config", value=False)
    return changed(values, f"{LAUNCHER}/kubeconfig_file", value=str(running.kubeconfig))


def test_a_run_in_a_pod_exports_its_interval(cluster: Cluster, source: Source, target: Target, hour: datetime) -> None:
    source.insert("events", *(event(hour + timedelta(seconds=second)) for second in range(ROWS)))
    run, job = cluster.launch(partition_key(hour))
    for version in VERSIONS:
        kubernetes_validate.validate(cluster.node.jobs[job], version, strict=True)
    labels = cluster.node.jobs[job]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "run_worker", "network.yaml selects runs by it"
    # The pod has no token of Kubernetes: a run that asked for the launcher would fail.
    cluster.node.kubeconfig.unlink()
    cluster.node.start(job)
    assert cluster.node.wait(job) == 0, cluster.node.log(job)[-3000:]
    assert cluster.state(run).status is dg.DagsterRunStatus.SUCCESS, cluster.node.log(job)[-3000:]
    assert cluster.instance.run_launcher.check_run_worker_health(run).status is WorkerStatus.SUCCESS
    assert target.count("events") == ROWS


@pytest.mark.parametrize("wish", ["another image", "the node's files", "privileged"])
def test_of_a_run_whose_tags_ask_for_another_pod_no_job_is_sent(cluster: Cluster, hour: datetime, wish: str) -> None:
    with pytest.raises(Exception, match="violated the allowed list"):
        cluster.launch(partition_key(hour), **{"dagster-k8s/config": json.dumps(OTHER_PODS[wish])})
    assert not cluster.node.jobs


def test_a_run_whose_pod_is_killed_fails_and_is_to_be_started_again(
    cluster: Cluster, source: Source, target: Target, hour: datetime
) -> None:
    source.insert("events", *(event(hour + timedelta(seconds=second)) for second in range(ROWS)))
    run, job = cluster.launch(partition_key(hour))
    cluster.node.start(job)
    eventually(lambda: cluster.state(run).status is dg.DagsterRunStatus.STARTED, seconds=180)
    cluster.node.kill(job)
    health = cluster.instance.run_launcher.check_run_worker_health(cluster.state(run))
    assert health.status is WorkerStatus.FAILED
    [record] = cluster.instance.get_run_records(dg.RunsFilter(run_ids=[run.run_id]))
    monitor_started_run(cluster.instance, None, record, logging.getLogger(__name__))  # type: ignore[arg-type] # asks no workspace
    failed = cluster.state(run)
    assert failed.status is dg.DagsterRunStatus.FAILURE
    assert failed.tags["dagster/will_retry"] == "true"
    again, second = cluster.launch(partition_key(hour))
    cluster.node.start(second)
    assert cluster.node.wait(second) == 0, cluster.node.log(second)[-3000:]
    assert cluster.state(again).status is dg.DagsterRunStatus.SUCCESS
    assert target.count("events") == ROWS
