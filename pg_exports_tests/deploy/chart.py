"""What Dagster's Helm chart, 1.13, makes of the values: the instance's `dagster.yaml`, and the pods that stay.

The chart itself is not here. Its rules are few: camelCase becomes snake_case, a source of environment variables becomes its
name, what is empty is left out. A key that no rule reads is an error here; the chart drops most of those without a word.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_shared.yaml_utils import safe_load_yaml

HOME = "/opt/dagster/dagster_home"
RELEASE = "dagster"
NAMESPACE = "pg-exports"


def read(path: Path) -> dict[str, Any]:
    """The values in a file. What it refers to twice is there twice."""
    content = json.loads(json.dumps(safe_load_yaml(path.read_text())))
    assert isinstance(content, dict)
    return content


class UnknownKeyError(Exception):
    """A key that the chart does not read, or that it reads and is not there."""


REQUIRED = object()


class Values:
    """A part of the values that knows which of its keys were read."""

    def __init__(self, content: Mapping[str, Any], path: str = "") -> None:
        self._content = content
        self._path = path
        self._unread = set(content)
        self._parts: list[Values] = []

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """A key's value. Without a default it has to be there."""
        self._unread.discard(key)
        if default is REQUIRED and key not in self._content:
            raise UnknownKeyError(f"no {self._path}{key} among {', '.join(self._content)}")
        return self._content.get(key, default)

    def part(self, key: str, default: Any = REQUIRED) -> "Values":
        """What is under a key."""
        part = Values(self.take(key, default), f"{self._path}{key}.")
        self._parts.append(part)
        return part

    def check(self) -> None:
        """Whether all was read.

        Raises:
            UnknownKeyError: a key was not.
        """
        if self._unread:
            raise UnknownKeyError(", ".join(f"{self._path}{key}" for key in sorted(self._unread)))
        for part in self._parts:
            part.check()


@dataclass(frozen=True)
class Release:
    """What is installed: the instance's configuration, and the pods by the name of their part in the values."""

    instance: dict[str, Any]
    pods: dict[str, dict[str, Any]]


def render(content: Mapping[str, Any]) -> Release:
    """The release of these values.

    Raises:
        UnknownKeyError: a key that the chart does not read.
    """
    values = Values(content)
    daemon, webserver = values.part("dagsterDaemon"), values.part("dagsterWebserver")
    storage_secret = values.part("global").take("postgresqlSecretName")
    assert values.take("generatePostgresqlPasswordSecret") is False, "the chart would make a password of its own"
    code = values.part("dagster-user-deployments")
    assert code.take("enabled")
    assert code.take("enableSubchart")
    [deployment] = [Values(deployment, "deployments.") for deployment in code.take("deployments")]
    instance = {
        **_storages(values.part("postgresql")),
        "run_launcher": _run_launcher(values.part("runLauncher")),
        "run_coordinator": _run_coordinator(daemon.part("runCoordinator")),
        "compute_logs": {
            "module": "dagster.core.storage.noop_compute_log_manager",
            "class": _only(values.part("computeLogManager"), "NoOpComputeLogManager"),
        },
        **{key: _snake(daemon.take(camel)) for key, camel in _OF_THE_DAEMON.items()},
        "telemetry": values.take("telemetry"),
        "retention": _retention(values.part("retention")),
        "concurrency": _concurrency(values.part("concurrency")),
        **values.take("additionalInstanceConfig"),
    }
    pods = {
        "dagsterDaemon": _pod(daemon, "daemon", _labels("dagster-daemon", deployment="daemon"), storage_secret),
        "dagsterWebserver": _pod(
            webserver, "webserver", _labels("dagster-webserver"), storage_secret, **_web(webserver)
        ),
        "dagster-user-deployments": _code_server(deployment, storage_secret),
    }
    for part in (values, deployment):
        part.check()
    return Release(instance, pods)


def as_yaml(content: Mapping[str, Any]) -> str:
    """The instance's `dagster.yaml` for these values. JSON is YAML."""
    return json.dumps(render(content).instance)


_OF_THE_DAEMON = {"run_monitoring": "runMonitoring", "run_retries": "runRetries"}


def _snake(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {re.sub(r"([A-Z])", lambda letter: "_" + letter[0].lower(), key): settings[key] for key in settings}


def _only(part: Values, choice: str) -> str:
    assert part.take("type") == choice, f"other types than {choice} are not rendered here"
    return choice


def _storages(part: Values) -> dict[str, Any]:
    assert part.take("enabled") is False, "the chart would start a Postgres of its own"
    config = {
        "postgres_db": {
            "username": part.take("postgresqlUsername"),
            "password": {"env": "DAGSTER_PG_PASSWORD"},
            "hostname": part.take("postgresqlHost"),
            "db_name": part.take("postgresqlDatabase"),
            "port": part.part("service").take("port"),
            "params": part.take("postgresqlParams"),
        }
    }
    classes = {
        "schedule_storage": ("dagster_postgres.schedule_storage", "PostgresScheduleStorage"),
        "run_storage": ("dagster_postgres.run_storage", "PostgresRunStorage"),
        "event_log_storage": ("dagster_postgres.event_log", "PostgresEventLogStorage"),
    }
    return {key: {"module": module, "class": name, "config": config} for key, (module, name) in classes.items()}


def _run_launcher(part: Values) -> dict[str, Any]:
    assert part.take("type") == "CustomRunLauncher", (
        "the chart's own section of the launcher cannot restrict a run's tags"
    )
    launcher = part.part("config").part("customRunLauncher")
    return {"module": launcher.take("module"), "class": launcher.take("class"), "config": launcher.take("config")}


def _run_coordinator(part: Values) -> dict[str, Any]:
    assert part.take("enabled")
    name = _only(part, "QueuedRunCoordinator")
    return {"module": "dagster.core.run_coordinator", "class": name, "config": {"dequeue_use_threads": True}}


def _retention(part: Values) -> dict[str, Any]:
    assert part.take("enabled")
    return {name: {"purge_after_days": part.part(name).take("purgeAfterDays")} for name in ("schedule", "sensor")}


def _concurrency(part: Values) -> dict[str, Any]:
    assert part.take("enabled")
    return {"runs": _snake(part.take("runs")), "pools": _snake(part.take("pools"))}


def _pod(part: Values, name: str, labels: dict[str, str], storage_secret: str, **settings: Any) -> dict[str, Any]:
    """A pod with what the values have of it. The chart adds the files of the instance and the workspace."""
    image = part.part("image")
    assert part.take("checkDbReadyInitContainer", False) is False, "an init container is not rendered here"
    variable = {"secretKeyRef": {"name": storage_secret, "key": "postgresql-password"}}
    container = {
        "name": name,
        "image": f"{image.take('repository')}:{image.take('tag')}",
        "imagePullPolicy": image.take("pullPolicy"),
        "env": [
            {"name": "DAGSTER_PG_PASSWORD", "valueFrom": variable},
            # The chart has a ConfigMap of its own for them.
            *({"name": name, "value": value} for name, value in part.take("env", {}).items()),
        ],
        "envFrom": [
            *({"configMapRef": source} for source in part.take("envConfigMaps", [])),
            *({"secretRef": source} for source in part.take("envSecrets", [])),
        ],
        "securityContext": part.take("securityContext"),
        "resources": part.take("resources"),
        "volumeMounts": part.take("volumeMounts"),
        **settings,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "serviceAccountName": RELEASE,
            "securityContext": part.take("podSecurityContext"),
            "containers": [container],
            "volumes": part.take("volumes"),
        },
    }


def _web(part: Values) -> dict[str, Any]:
    assert part.take("replicaCount") == 1
    service = part.part("service")
    assert service.take("type") == "ClusterIP"
    probe = {"periodSeconds": 20, "timeoutSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
    return {
        "ports": [{"name": "http", "containerPort": service.take("port"), "protocol": "TCP"}],
        "readinessProbe": probe | part.take("readinessProbe"),
    }


def _code_server(part: Values, storage_secret: str) -> dict[str, Any]:
    inherited = part.part("includeConfigInLaunchedRuns").take("enabled")
    assert inherited is False, "a code location's resources would win over those of the run launcher"
    arguments = [
        "dagster",
        "api",
        "grpc",
        "-h",
        "0.0.0.0",
        "-p",
        str(part.take("port")),
        *part.take("dagsterApiGrpcArgs"),
    ]
    name = part.take("name")
    labels = _labels("user-deployments", "dagster-user-deployments", deployment=name)
    return _pod(part, name, labels, storage_secret, args=arguments)


def _labels(component: str, chart: str = "dagster", **others: str) -> dict[str, str]:
    of_the_chart = {"app.kubernetes.io/name": chart, "app.kubernetes.io/instance": RELEASE}
    return {**of_the_chart, "component": component, **others}
