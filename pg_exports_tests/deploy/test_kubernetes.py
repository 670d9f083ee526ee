"""`deploy/kubernetes`: the values as Dagster's own classes read them, every manifest and pod as Kubernetes does.

No cluster is asked. The schemas are those of the Kubernetes versions in `VERSIONS`, strict: an unknown field is an error.
"""

import copy
import json
import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes.client
import kubernetes_validate
import pytest
from dagster._core.errors import DagsterInvalidConfigError
from dagster._core.instance.config import ConcurrencyConfig, dagster_instance_config
from dagster._core.instance.ref import InstanceRef
from dagster._core.run_coordinator import QueuedRunCoordinator
from dagster._serdes import ConfigurableClassData
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import construct_dagster_k8s_job
from dagster_postgres.utils import pg_url_from_config
from dagster_shared.yaml_utils import safe_load_yaml

from pg_exports_tests.deploy.chart import HOME, NAMESPACE, RELEASE, as_yaml, read, render

VERSIONS = ("1.33", "1.37")
"""The oldest and the newest Kubernetes that docs/kubernetes.md names."""

REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = REPOSITORY / "deploy" / "kubernetes"
MEBIBYTE = 2**20

# Of a run's memory, in bytes: what README.md promises for every interval. A pod counts the same bytes.
PROMISED = 600_000_000


@pytest.fixture
def values() -> dict[str, Any]:
    return read(FOLDER / "values.yaml")


def manifests(name: str) -> list[dict[str, Any]]:
    return [safe_load_yaml(part) for part in (FOLDER / name).read_text().split("\n---\n")]


ALL_MANIFESTS = [
    manifest for name in ("namespace", "secrets", "settings", "network") for manifest in manifests(f"{name}.yaml")
]


def instance_of(values: Mapping[str, Any], folder: Path) -> InstanceRef:
    """The instance as Dagster reads it from the `dagster.yaml` that the chart writes."""
    (folder / "dagster.yaml").write_text(as_yaml(values))
    return InstanceRef.from_dir(str(folder))


def launcher_of(values: Mapping[str, Any]) -> K8sRunLauncher:
    """The run launcher, made by its own class from its own schema. It takes a cluster's address from a file here."""
    config = render(values).instance["run_launcher"]["config"]
    address = {"load_incluster_config": False, "kubeconfig_file": str(Path(__file__).parent / "kubeconfig.yaml")}
    data = ConfigurableClassData("dagster_k8s", "K8sRunLauncher", json.dumps(config | address))
    return data.rehydrate(as_type=K8sRunLauncher)


def job_of_a_run(values: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The Job that the launcher sends for a run with these tags."""
    launcher = launcher_of(values)
    context = launcher.get_container_context_for_run(dg.DagsterRun(job_name="events_job", tags=tags or {}))
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config("registry.example.com/pg-exports:0.1.0", launcher),
        args=["dagster", "api", "execute_run", "{}"],
        job_name="dagster-run-0",
        component="run_worker",
        user_defined_k8s_config=context.run_k8s_config,
    )
    sent = kubernetes.client.ApiClient().sanitize_for_serialization(job)
    assert isinstance(sent, dict)
    return sent


def pods(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All pods: those that stay, and a run's."""
    run = {"apiVersion": "v1", "kind": "Pod", **job_of_a_run(values)["spec"]["template"]}
    return {**render(values).pods, "runLauncher": run}


def container(pod: Mapping[str, Any]) -> dict[str, Any]:
    [only] = pod["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def bytes_of(quantity: str) -> int:
    size = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert size, quantity
    return int(size[1]) * {"Mi": MEBIBYTE, "Gi": 1024 * MEBIBYTE}[size[2]]


def validate(manifest: Mapping[str, Any]) -> None:
    """Whether both versions of Kubernetes know each field of a manifest."""
    for version in VERSIONS:
        assert kubernetes_validate.validate(dict(manifest), version, strict=True) == version


def everything_loads(values: Mapping[str, Any], folder: Path) -> None:
    instance_of(values, folder)
    validate(job_of_a_run(values))
    for pod in pods(values).values():
        validate(pod)


def changed(values: Mapping[str, Any], path: str, *, key: str | None = None, value: Any = None) -> dict[str, Any]:
    """The values with one key renamed, or with another value. A number in the path is a place in a list."""
    copied = copy.deepcopy(dict(values))
    *way, last = path.split("/")
    part: Any = copied
    for step in way:
        part = part[int(step) if step.isdigit() else step]
    if key:
        part[key] = part.pop(last)
    else:
        part[last] = value
    return copied


LAUNCHER = "runLauncher/config/customRunLauncher/config"
CODE = "dagster-user-deployments/deployments/0"


# The instance.


def test_dagster_takes_the_instance_that_the_values_make(values: dict[str, Any], tmp_path: Path) -> None:
    ref = instance_of(values, tmp_path)
    assert isinstance(ref.run_coordinator, QueuedRunCoordinator)
    settings, _ = dagster_instance_config(str(tmp_path))
    limits = ConcurrencyConfig.from_concurrency_settings(
        settings["concurrency"], ref.run_coordinator.get_run_queue_config()
    )
    assert limits.run_queue_config
    assert limits.run_queue_config.max_concurrent_runs == 10
    assert limits.pool_config.default_pool_limit == 4
    assert ref.run_launcher_data
    assert ref.run_launcher_data.class_name == "K8sRunLauncher"


def test_the_values_say_what_dagster_yaml_says(values: dict[str, Any]) -> None:
    on_one_machine = safe_load_yaml((REPOSITORY / "dagster.yaml").read_text())
    del on_one_machine["storage"]
    instance = render(values).instance
    for part, settings in on_one_machine.items():
        assert {**instance[part], **settings} == instance[part], part


def test_the_storage_is_reached_over_verified_tls(values: dict[str, Any]) -> None:
    for storage in ("run_storage", "event_log_storage", "schedule_storage"):
        config = render(values).instance[storage]["config"]["postgres_db"]
        assert config["password"] == {"env": "DAGSTER_PG_PASSWORD"}
        address, _, parameters = pg_url_from_config({"postgres_db": {**config, "password": "p"}}).partition("?")
        assert address == "postgresql://dagster:p@dagster-storage.example.com:5432/dagster"
        assert parameters.replace("%2F", "/") == "sslmode=verify-full&sslrootcert=/etc/pg_exports/ca/storage.crt"


def test_one_limit_in_two_places_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    instance = render(values).instance
    instance["run_coordinator"]["config"]["max_concurrent_runs"] = 10
    (tmp_path / "dagster.yaml").write_text(json.dumps(instance))
    with pytest.raises(DagsterInvalidConfigError, match="max_concurrent_runs"):
        InstanceRef.from_dir(str(tmp_path))


# Kubernetes.


@pytest.mark.parametrize("manifest", ALL_MANIFESTS, ids=lambda manifest: manifest["metadata"]["name"])
def test_kubernetes_knows_every_field_of_a_manifest(manifest: dict[str, Any]) -> None:
    validate(manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(manifest | {"metdata": {}})


def test_kubernetes_knows_every_field_of_the_pods_and_of_a_runs_job(values: dict[str, Any], tmp_path: Path) -> None:
    everything_loads(values, tmp_path)


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [
        ("postgresql/postgresqlHost", "postgresHost"),
        ("postgresql/postgresqlParams", "params"),
        ("concurrency/runs", "run"),
        ("concurrency/pools/defaultLimit", "limits"),
        ("dagsterDaemon/runMonitoring", "monitoring"),
        ("dagsterDaemon/runMonitoring/maxRuntimeSeconds", "max_run_seconds"),
        ("dagsterDaemon/runRetries/retryOnAssetOrOpFailure", "retry_on_failure"),
        ("dagsterDaemon/podSecurityContext/runAsNonRoot", "runAsNonroot"),
        ("dagsterWebserver/readinessProbe/httpGet/port", "ports"),
        ("retention/sensor/purgeAfterDays/skipped", "skip"),
        ("telemetry/enabled", "enable"),
        ("additionalInstanceConfig/nux", "nox"),
        (f"{LAUNCHER}/env_secrets", "env_secret"),
        (f"{LAUNCHER}/only_allow_user_defined_k8s_config_fields", "only_allow"),
        (f"{LAUNCHER}/run_k8s_config/pod_spec_config", "pod_spec"),
        (f"{LAUNCHER}/run_k8s_config/pod_spec_config/tolerations", "tolerates"),
        (f"{LAUNCHER}/run_k8s_config/pod_spec_config/tolerations/0/tolerationSeconds", "seconds"),
        (f"{LAUNCHER}/run_k8s_config/job_spec_config/backoffLimit", "backOffLimit"),
        (f"{LAUNCHER}/security_context/readOnlyRootFilesystem", "readOnly"),
        (f"{LAUNCHER}/volumes/1/emptyDir/sizeLimit", "limit"),
        (f"{LAUNCHER}/resources/limits", "limit"),
        (f"{CODE}/dagsterApiGrpcArgs", "dagsterApiArgs"),
        (f"{CODE}/resources/requests", "request"),
        (f"{CODE}/volumeMounts/0/mountPath", "path"),
    ],
)
def test_a_misspelt_key_is_refused(values: dict[str, Any], tmp_path: Path, path: str, misspelt: str) -> None:
    # Each of the four readers has an exception of its own; dagster-k8s's is a plain one. All of them name the key.
    with pytest.raises(Exception, match=misspelt):
        everything_loads(changed(values, path, key=misspelt), tmp_path)


def test_no_pod_breaks_the_rules_that_the_namespace_enforces(values: dict[str, Any]) -> None:
    [namespace] = manifests("namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(values).values():
        of_the_pod, of_the_container = pod["spec"]["securityContext"], container(pod)["securityContext"]
        assert of_the_pod["runAsNonRoot"] is True
        assert of_the_pod["runAsUser"] > 0
        assert of_the_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert of_the_container == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        kinds = {kind for volume in pod["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"secret", "configMap", "emptyDir"}


def test_a_run_gets_no_token_of_kubernetes_but_the_password_of_dagsters_storage(values: dict[str, Any]) -> None:
    pod = pods(values)["runLauncher"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    [password] = [entry for entry in container(pod)["env"] if entry["name"] == "DAGSTER_PG_PASSWORD"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "pg-exports-storage", "key": "postgresql-password"}


def test_a_run_s_names_are_those_that_the_chart_gives_and_its_environment_the_code_server_s(
    values: dict[str, Any],
) -> None:
    config = render(values).instance["run_launcher"]["config"]
    assert config["service_account_name"] == RELEASE
    assert config["instance_config_map"] == f"{RELEASE}-instance"
    assert config["dagster_home"] == HOME
    assert config["job_namespace"] == NAMESPACE == manifests("namespace.yaml")[0]["metadata"]["name"]
    assert config["postgres_password_secret"] == values["global"]["postgresqlSecretName"]
    code_server, run = (container(pods(values)[name]) for name in ("dagster-user-deployments", "runLauncher"))
    assert code_server["envFrom"] == run["envFrom"]


OTHER_PODS: dict[str, dict[str, Any]] = {
    "another image": {"container_config": {"image": "registry.example.com/another:1"}},
    "another command": {"container_config": {"command": ["sh", "-c", "env"]}},
    "a variable": {"container_config": {"env": [{"name": "PYTHONPATH", "value": "/tmp"}]}},
    "another secret": {"container_config": {"env_from": [{"secret_ref": {"name": "another"}}]}},
    "privileged": {"container_config": {"security_context": {"privileged": True}}},
    "the node's files": {"pod_spec_config": {"volumes": [{"name": "host", "host_path": {"path": "/"}}]}},
    "the node's network": {"pod_spec_config": {"host_network": True}},
    "root": {"pod_spec_config": {"security_context": {"run_as_user": 0}}},
    "a token": {"pod_spec_config": {"automount_service_account_token": True}},
    "another account": {"pod_spec_config": {"service_account_name": "cluster-admin"}},
    "a second container": {"pod_spec_config": {"containers": [{"name": "b", "image": "registry.example.com/b:1"}]}},
    "other labels": {"pod_template_spec_metadata": {"labels": {"component": "dagster-daemon"}}},
    "another namespace": {"job_metadata": {"namespace": "kube-system"}},
    "many pods": {"job_spec_config": {"parallelism": 1000}},
    "a job of its own": {"job_config": {"metadata": {"namespace": "kube-system"}}},
}
"""What the tag `dagster-k8s/config` could ask for."""


@pytest.mark.parametrize("wish", OTHER_PODS)
@pytest.mark.parametrize("merge", ["DEEP", "SHALLOW"])
def test_a_run_s_tags_get_it_no_other_pod(values: dict[str, Any], wish: str, merge: str) -> None:
    tags = {"dagster-k8s/config": json.dumps(OTHER_PODS[wish] | {"merge_behavior": merge})}
    [(part, fields)] = OTHER_PODS[wish].items()
    [field] = fields
    with pytest.raises(Exception, match=rf"violated the allowed list: {part}\.{field}"):
        job_of_a_run(values, tags)


def test_without_the_list_of_what_tags_may_change_they_would_get_it(values: dict[str, Any]) -> None:
    config = values["runLauncher"]["config"]["customRunLauncher"]["config"]
    del config["only_allow_user_defined_k8s_config_fields"]
    pod = job_of_a_run(values, {"dagster-k8s/config": json.dumps(OTHER_PODS["another image"])})["spec"]["template"]
    assert container(pod)["image"] == "registry.example.com/another:1"


def test_kubernetes_never_starts_a_run_again_by_itself(values: dict[str, Any]) -> None:
    job = job_of_a_run(values)
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


# The environment.


def test_the_pods_of_exports_have_all_variables_that_the_definitions_read(values: dict[str, Any]) -> None:
    defs = REPOSITORY / "pg_exports" / "defs"
    read_by_defs = {
        name
        for path in [*defs.rglob("*.py"), *defs.rglob("*.yaml")]
        for name in re.findall(r"\b(?:CLICKHOUSE|POSTGRES|PG_EXPORTS)_[A-Z_]+\b", path.read_text())
    }
    assert {"POSTGRES_PASSWORD", "CLICKHOUSE_CA_CERTIFICATE", "PG_EXPORTS_TEAM_ID"} <= read_by_defs
    given_by = {
        manifest["metadata"]["name"]: set(manifest.get("data", manifest.get("stringData", ())))
        for manifest in ALL_MANIFESTS
    }
    all_pods = pods(values)
    for name in ("dagster-user-deployments", "runLauncher"):
        sources = [next(iter(source.values()))["name"] for source in container(all_pods[name])["envFrom"]]
        assert set().union(*(given_by[source] for source in sources)) == read_by_defs, name


def test_each_file_that_a_setting_names_is_mounted_where_it_says(values: dict[str, Any]) -> None:
    [settings] = manifests("settings.yaml")
    [authorities] = [manifest for manifest in ALL_MANIFESTS if manifest["metadata"]["name"] == "pg-exports-ca"]
    named = {value for value in settings["data"].values() if value.startswith("/")}
    named.add(values["postgresql"]["postgresqlParams"]["sslrootcert"])
    for pod in pods(values).values():
        [mount] = [mount for mount in container(pod)["volumeMounts"] if mount["name"] == "ca"]
        [volume] = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "ca"]
        assert volume["secret"]["secretName"] == authorities["metadata"]["name"]
        assert {f"{mount['mountPath']}/{key}" for key in authorities["stringData"]} == named


def test_no_secret_is_in_the_repository() -> None:
    secrets = [manifest for manifest in ALL_MANIFESTS if manifest["kind"] == "Secret"]
    assert len(secrets) == 3
    for secret in secrets:
        assert set(secret["stringData"].values()) == {"REPLACE"}
        assert "data" not in secret
    assert not re.search(r"password", (FOLDER / "settings.yaml").read_text(), re.IGNORECASE)


# The network.

STORAGE, CLICKHOUSE, POSTGRES, KUBERNETES = "192.0.2.10", "192.0.2.20", "192.0.2.30", "192.0.2.50"
DNS = ("kube-system", {"k8s-app": "kube-dns"})
PROXY = ("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"})
STRANGER = ("default", {"component": "dagster-daemon"})

Peer = str | tuple[str, dict[str, str]]
"""An address, or a pod: its namespace and labels."""


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector of labels selects these."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def is_peer(rule: Mapping[str, Any], other: Peer) -> bool:
    """Whether an entry of `from` or `to` means another one."""
    if isinstance(other, str):
        return "ipBlock" in rule and ip_address(other) in ip_network(rule["ipBlock"]["cidr"])
    namespace, labels = other
    if "ipBlock" in rule:
        return False
    if "namespaceSelector" in rule:
        in_namespace = selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        in_namespace = namespace == NAMESPACE
    return in_namespace and selects(rule.get("podSelector", {}), labels)


def permits(direction: str, labels: Mapping[str, str], other: Peer, port: int) -> bool:
    """Whether the policies let a pod of the namespace connect to another one (Egress), or be connected to (Ingress)."""
    here = [policy["spec"] for policy in manifests("network.yaml") if selects(policy["spec"]["podSelector"], labels)]
    assert any(direction in policy["policyTypes"] for policy in here), "a pod that no policy selects may do anything"
    key, peers = {"Egress": ("egress", "to"), "Ingress": ("ingress", "from")}[direction]
    return any(
        any(is_peer(peer, other) for peer in rule[peers]) and any(entry["port"] == port for entry in rule["ports"])
        for policy in here
        for rule in policy.get(key, ())
    )


def connects(source: Peer, target: Peer, port: int) -> bool:
    """Whether a connection is made: both sides must permit it."""
    return (isinstance(source, str) or source[0] != NAMESPACE or permits("Egress", source[1], target, port)) and (
        isinstance(target, str) or target[0] != NAMESPACE or permits("Ingress", target[1], source, port)
    )


def test_pods_reach_what_they_need_and_nothing_else(values: dict[str, Any]) -> None:
    ours: dict[str, Peer] = {name: (NAMESPACE, pod["metadata"]["labels"]) for name, pod in pods(values).items()}
    targets: list[tuple[str, Peer, int]] = [
        ("dns", DNS, 53),
        ("storage", STORAGE, 5432),
        ("clickhouse", CLICKHOUSE, 8443),
        ("postgres", POSTGRES, 5432),
        ("kubernetes", KUBERNETES, 6443),
        ("code", ours["dagster-user-deployments"], 3030),
        ("web", ours["dagsterWebserver"], 3000),
        ("run", ours["runLauncher"], 3030),
        ("daemon", ours["dagsterDaemon"], 3030),
        ("elsewhere", "198.51.100.1", 443),
        ("the cloud's metadata", "169.254.169.254", 80),
        ("clickhouse's other port", CLICKHOUSE, 9000),
    ]
    reached = {
        name: {target for target, peer, port in targets if connects(pod, peer, port)} for name, pod in ours.items()
    }
    assert reached == {
        "dagsterDaemon": {"dns", "storage", "kubernetes", "code"},
        "dagsterWebserver": {"dns", "storage", "kubernetes", "code"},
        "dagster-user-deployments": {"dns", "storage", "clickhouse", "postgres"},
        "runLauncher": {"dns", "storage", "clickhouse", "postgres"},
    }


def test_only_the_proxy_reaches_the_web_server_from_outside_and_nobody_another_pod(values: dict[str, Any]) -> None:
    ours: dict[str, Peer] = {name: (NAMESPACE, pod["metadata"]["labels"]) for name, pod in pods(values).items()}
    for name, pod in ours.items():
        for port in (3000, 3030, 22):
            assert connects(PROXY, pod, port) == ((name, port) == ("dagsterWebserver", 3000))
            assert not connects(STRANGER, pod, port)
            assert not connects("198.51.100.1", pod, port)


# Sizes, addresses, versions.


def test_a_run_fits_its_request_and_has_room_to_its_limit(values: dict[str, Any]) -> None:
    memory = {
        bound: bytes_of(size["memory"]) for bound, size in container(pods(values)["runLauncher"])["resources"].items()
    }
    assert PROMISED < memory["requests"] < memory["limits"]


@pytest.mark.parametrize("config", ["container_config", "containerConfig"])
def test_a_run_with_a_tag_of_its_own_gets_more_memory(values: dict[str, Any], config: str) -> None:
    tag = json.dumps({config: {"resources": {"requests": {"memory": "3Gi"}, "limits": {"memory": "4Gi"}}}})
    if config == "containerConfig":
        with pytest.raises(DagsterInvalidConfigError):
            job_of_a_run(values, {"dagster-k8s/config": tag})
        return
    job = job_of_a_run(values, {"dagster-k8s/config": tag})
    resources = container(job["spec"]["template"])["resources"]
    assert resources == {"requests": {"cpu": "500m", "memory": "3Gi"}, "limits": {"memory": "4Gi"}}
    validate(job)


def test_the_code_servers_sizes_never_become_a_runs(values: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="would win over"):
        render(changed(values, f"{CODE}/includeConfigInLaunchedRuns/enabled", value=True))


def test_the_web_servers_probe_asks_the_port_that_it_serves(values: dict[str, Any]) -> None:
    web = container(pods(values)["dagsterWebserver"])
    assert web["readinessProbe"]["httpGet"]["port"] == web["ports"][0]["containerPort"] == 3000


def test_all_pods_have_one_image_and_it_has_a_tag(values: dict[str, Any]) -> None:
    [image] = {container(pod)["image"] for pod in pods(values).values()}
    assert re.search(r":\d+\.\d+\.\d+$", image)


def test_the_chart_is_of_the_dagster_that_the_image_installs() -> None:
    constraints = (REPOSITORY / "deploy" / "constraints.txt").read_text()
    dagster = re.search(r"^dagster==(.+)$", constraints, re.MULTILINE)
    assert dagster
    for text in ((FOLDER / "values.yaml").read_text(), (REPOSITORY / "docs" / "kubernetes.md").read_text()):
        assert set(re.findall(r"--version (\S+)", text)) == {dagster[1]}
