"""`deploy/celery`: its files are what Dagster's and Celery's own classes make of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dagster_celery", reason="dagster-celery is not installed: `make cluster`")

from dagster._core.instance.config import dagster_instance_config
from dagster._core.instance.ref import InstanceRef
from dagster_celery.launcher import CeleryRunLauncher
from dagster_shared.yaml_utils import load_yaml_from_path

from pg_exports_tests.cluster.deployment import BROKER, SETTINGS, WORKER_OPTIONS
from pg_exports_tests.ui.deployment import REPOSITORY

URL = "rediss://:secret@broker.example:6379/0?ssl_cert_reqs=required&ssl_ca_certs=/etc/ssl/certs/ca-certificates.crt"


def test_dagster_makes_a_celery_launcher_of_it_with_broker_and_results_in_redis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(BROKER, URL)
    launcher = InstanceRef.from_dir(str(SETTINGS)).run_launcher
    assert isinstance(launcher, CeleryRunLauncher)
    assert (launcher.broker, launcher.backend) == (URL, URL)
    assert launcher.supports_check_run_worker_health
    assert launcher.celery.conf.worker_disable_prefetch
    assert launcher.celery.conf.worker_max_tasks_per_child == 1


def test_dagster_accepts_every_setting_and_each_pool_has_a_limit() -> None:
    settings, _ = dagster_instance_config(str(SETTINGS))
    assert settings["concurrency"]["pools"] == {"default_limit": 4, "granularity": "op"}
    assert settings["run_monitoring"]["enabled"]
    single = load_yaml_from_path(str(REPOSITORY / "dagster.yaml"))
    assert isinstance(single, dict)
    assert settings["run_retries"] == single["run_retries"]
    assert settings["storage"] == single["storage"]


def test_workers_have_the_launcher_s_settings() -> None:
    program = (
        "from dagster_celery.app import app; c = app.conf;"
        "print(c.broker_url, c.result_backend, c.worker_disable_prefetch, c.worker_prefetch_multiplier, c.task_acks_late,"
        " c.broker_transport_options['visibility_timeout'], c.worker_max_tasks_per_child)"
    )
    said = _python(program, {BROKER: URL, "DAGSTER_HOME": str(SETTINGS)})
    assert said.stdout.split() == [URL, URL, "True", "1", "False", "3600", "1"], said.stderr


def test_a_worker_without_the_right_home_says_so(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("")
    said = _python("import dagster_celery.app", {"DAGSTER_HOME": str(tmp_path)})
    assert said.returncode == 1
    assert "has no dagster.yaml with a CeleryRunLauncher: it should be that of deploy/celery" in said.stderr


def _python(program: str, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        (sys.executable, "-c", program),
        env={**os.environ, **variables, "PYTHONPATH": str(SETTINGS)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_workspace_names_modules_that_are_there() -> None:
    workspace = load_yaml_from_path(str(SETTINGS / "workspace.yaml"))
    assert isinstance(workspace, dict)
    modules = {
        entry["python_module"]["location_name"]: entry["python_module"]["module_name"]
        for entry in workspace["load_from"]
    }
    assert modules == {"pg_exports": "pg_exports.definitions", "lost_runs": "pg_exports.lost_runs"}
    assert all(importlib.util.find_spec(module) for module in modules.values())


def test_the_cluster_s_workers_are_started_as_the_unit_starts_them() -> None:
    unit = " ".join((SETTINGS / "pg-exports-worker.service").read_text().replace("\\\n", "").split())
    assert "celery --app dagster_celery.app worker" in unit
    assert " ".join(WORKER_OPTIONS) in unit
    assert "KillMode=mixed" in unit


def test_a_single_machine_loads_nothing_of_celery() -> None:
    # `dagster_celery` itself is no part of Dagster; whatever loads it loads the others.
    loaded = "sorted({name.split('.')[0] for name in sys.modules} & {'celery', 'dagster_celery', 'kombu', 'redis'})"
    said = _python(f"import sys, pg_exports.definitions; print({loaded})", {})
    assert said.stdout.strip() == "[]", said.stderr
