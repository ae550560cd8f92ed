"""The manifests, rendered by the real kustomize: schemas, and what no schema can see."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.unit.deploy import kubectl

Object = dict[str, Any]

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "deploy" / "kubernetes"

# The oldest that has preStop.sleep on by default, and the newest whose schemas the test extra brings.
KUBERNETES_VERSIONS = ["1.30", "1.37"]
CONFIGMAP_LIMIT_BYTES = 1024 * 1024
# Weights of the default model (bf16), the float32 copy while it is converted, torch itself.
RUNTIME_BYTES = 2 * 1024**3
# Created by whoever deploys, as deploy/README.md says: Secret -> keys.
OUTSIDE_SECRETS = {"motet-admin": {"admin-key"}}


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    binary = kubectl.find()
    if binary is None:
        message = "no kubectl: run `python -m tests.unit.deploy.kubectl`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    done = subprocess.run([binary, "kustomize", MANIFESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return [item for item in yaml.safe_load_all(done.stdout) if item]


@pytest.fixture
def pod(objects: list[Object]) -> Object:
    spec: Object = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Object) -> Object:
    (only,) = pod["containers"]
    result: Object = only
    return result


@pytest.fixture
def options(objects: list[Object], container: Object) -> Object:
    """The TOML that the rendered pod reads, found by the way the pod finds it."""
    path = literal_env(container)["MOTET_CONFIG"]
    mount = mount_of(container, path)
    volume = volumes_of(objects)[mount["name"]]
    return tomllib.loads(configmaps(objects)[volume["configMap"]["name"]]["data"][Path(path).name])


def of_kind(objects: list[Object], kind: str) -> Object:
    (only,) = (item for item in objects if item["kind"] == kind)
    return only


def configmaps(objects: list[Object]) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == "ConfigMap"}


def volumes_of(objects: list[Object]) -> dict[str, Object]:
    spec = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    return {volume["name"]: volume for volume in spec["volumes"]}


def literal_env(container: Object) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def mount_of(container: Object, path: str) -> Object:
    """The deepest mount that holds the path."""
    holding = [m for m in container["volumeMounts"] if Path(path).is_relative_to(m["mountPath"])]
    assert holding, f"{path} is on no mounted volume"
    deepest: Object = max(holding, key=lambda mount: len(Path(mount["mountPath"]).parts))
    return deepest


def keys_in(objects: list[Object], volume: Object) -> set[str]:
    """The file names at the top of a ConfigMap or Secret volume."""
    if "configMap" in volume:
        configmap = configmaps(objects)[volume["configMap"]["name"]]
        return set(configmap.get("data", {})) | set(configmap.get("binaryData", {}))
    return OUTSIDE_SECRETS[volume["secret"]["secretName"]]


def size_bytes(text: str) -> int:
    """5Gi, as Kubernetes writes it, and 1GiB, as motet does."""
    found = re.fullmatch(r"(\d+)([KMGT])i(B?)", text)
    assert found, f"unexpected size {text!r}"
    return int(found[1]) << 10 * ("KMGT".index(found[2]) + 1)


# Schemas


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize(
    "path", sorted(set(MANIFESTS.glob("*.yaml")) - {MANIFESTS / "kustomization.yaml"}), ids=lambda path: path.name
)
def test_each_file_is_strictly_valid_by_itself(path: Path, version: str) -> None:
    for item in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_rendered_object_is_strictly_valid(objects: list[Object], version: str) -> None:
    for item in objects:
        kubernetes_validate.validate(item, version, strict=True)


def test_every_manifest_is_listed() -> None:
    listed = set(yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"])
    assert {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"} <= listed


def test_strict_validation_is_strict() -> None:
    item = yaml.safe_load((MANIFESTS / "service.yaml").read_text())
    item["spec"]["prots"] = item["spec"].pop("ports")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, KUBERNETES_VERSIONS[0], strict=True)


# References


def test_every_mount_has_its_volume_and_every_volume_its_mount(container: Object, objects: list[Object]) -> None:
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert sorted(mounted) == sorted(volumes_of(objects))


def test_every_volume_source_exists(objects: list[Object]) -> None:
    for name, volume in volumes_of(objects).items():
        if "configMap" in volume:
            assert volume["configMap"]["name"] in configmaps(objects), name
        elif "secret" in volume:
            assert volume["secret"]["secretName"] in OUTSIDE_SECRETS, name
        else:
            assert "emptyDir" in volume, name


def test_every_configmap_is_used(objects: list[Object]) -> None:
    used = {v["configMap"]["name"] for v in volumes_of(objects).values() if "configMap" in v}
    assert used == set(configmaps(objects))


def test_secrets_are_documented_and_not_committed(objects: list[Object]) -> None:
    assert "Secret" not in {item["kind"] for item in objects}
    readme = (ROOT / "deploy" / "README.md").read_text()
    documented = re.findall(r"create secret generic (\S+) --from-file=([^=\s]+)=", readme)
    assert set(documented) == {(secret, key) for secret, keys in OUTSIDE_SECRETS.items() for key in keys}


def test_named_ports_resolve(container: Object, objects: list[Object]) -> None:
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    for port in of_kind(objects, "Service")["spec"]["ports"]:
        assert port["targetPort"] in ports


def test_selectors_find_the_pods(objects: list[Object]) -> None:
    deployment = of_kind(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        of_kind(objects, "Service")["spec"]["selector"],
        of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


def test_the_image_tag_is_the_version_of_the_project(container: Object) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"].rpartition(":")[2] == version


# Configuration


def test_options_exist(options: Object, container: Object) -> None:
    from motet.server.config import ServeConfig

    known = {field.name for field in dataclasses.fields(ServeConfig)}
    assert set(options) <= known
    by_env = {name.removeprefix("MOTET_").lower() for name in literal_env(container) if name.startswith("MOTET_")}
    assert by_env <= known | {"config"}


def test_the_commented_out_options_exist_too() -> None:
    from motet.server.config import ServeConfig

    commented = re.findall(r"^# (\w+) = ", (MANIFESTS / "motet.toml").read_text(), re.MULTILINE)
    assert commented
    assert set(commented) <= {field.name for field in dataclasses.fields(ServeConfig)}


def test_the_server_listens_where_kubernetes_asks(options: Object, container: Object) -> None:
    assert container["args"] == ["serve"], "options belong in motet.toml, where these tests see them"
    assert options["host"] == "0.0.0.0"
    assert [options["port"]] == [port["containerPort"] for port in container["ports"]]


def test_the_config_is_the_only_motet_variable(pod: Object, container: Object) -> None:
    """A Service named motet makes Kubernetes set MOTET_PORT=tcp://… unless service links are off."""
    assert pod["enableServiceLinks"] is False
    assert {item["name"] for item in container["env"] if item["name"].startswith("MOTET_")} == {"MOTET_CONFIG"}
    assert "envFrom" not in container


def test_every_file_an_option_names_is_mounted(options: Object, container: Object, objects: list[Object]) -> None:
    volumes = volumes_of(objects)
    for option in ("admin_key_file", "api_key_file"):
        if option in options:
            path = Path(options[option])
            mount = mount_of(container, str(path))
            assert path.parent == Path(mount["mountPath"])
            assert path.name in keys_in(objects, volumes[mount["name"]])
    assert "admin_key_file" in options


def test_every_adapter_is_mounted_whole(options: Object, container: Object, objects: list[Object]) -> None:
    assert options["adapter"]
    for adapter in options["adapter"]:
        _name, _, path = adapter.partition("=")
        mount = mount_of(container, path)
        assert mount["mountPath"] == path
        # A folder without one of the two would fail at start; one with more would be hashed into the version.
        assert keys_in(objects, volumes_of(objects)[mount["name"]]) == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert any(Path(path).is_relative_to(root) for root in options["adapter_root"])


def test_an_adapter_arrives_byte_for_byte(objects: list[Object]) -> None:
    volume = volumes_of(objects)["adapter-boolq"]
    configmap = configmaps(objects)[volume["configMap"]["name"]]
    folder = ROOT / "examples" / "adapters" / "boolq"
    weights = base64.b64decode(configmap["binaryData"]["adapter_model.safetensors"])
    assert weights == (folder / "adapter_model.safetensors").read_bytes()
    assert configmap["data"]["adapter_config.json"] == (folder / "adapter_config.json").read_text()


def test_configmaps_fit_and_are_frozen(objects: list[Object]) -> None:
    for name, configmap in configmaps(objects).items():
        assert configmap["immutable"] is True, name
        text = sum(len(value.encode()) for value in configmap.get("data", {}).values())
        binary = sum(len(base64.b64decode(value)) for value in configmap.get("binaryData", {}).values())
        assert text + binary <= CONFIGMAP_LIMIT_BYTES, f"{name}: {text + binary} bytes"


@pytest.mark.parametrize("path", ["deploy/README.md", "deploy/kubernetes/kustomization.yaml"])
def test_apply_is_server_side(path: str) -> None:
    """Client-side apply refuses objects over 256 KiB: it keeps a copy of each in an annotation."""
    commands = re.findall(r"kubectl .*\bapply\b.*-k.*", (ROOT / path).read_text())
    assert commands
    for command in commands:
        assert "--server-side" in command


# Life and death of a pod


def test_probes(container: Object) -> None:
    assert container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"


def test_a_restart_is_slower_than_leaving_the_endpoints(container: Object) -> None:
    def seconds(probe: str) -> int:
        return int(container[probe]["periodSeconds"]) * int(container[probe]["failureThreshold"])

    assert seconds("readinessProbe") < seconds("livenessProbe")


def test_a_rollout_waits_as_long_as_a_start_may_take(container: Object, objects: list[Object]) -> None:
    probe = container["startupProbe"]
    assert of_kind(objects, "Deployment")["spec"]["progressDeadlineSeconds"] > (
        probe["periodSeconds"] * probe["failureThreshold"]
    )


def test_the_grace_period_covers_pre_stop_and_drain(pod: Object, container: Object, options: Object) -> None:
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop_s >= 5, "routers need seconds to learn that an endpoint is gone"
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + options["drain_timeout"]


def test_a_rollout_never_removes_a_ready_pod_first(objects: list[Object]) -> None:
    update = of_kind(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert update["maxUnavailable"] == 0
    assert update["maxSurge"] >= 1


def test_disruptions_are_bounded_but_possible(objects: list[Object]) -> None:
    replicas = of_kind(objects, "Deployment")["spec"]["replicas"]
    budget = of_kind(objects, "PodDisruptionBudget")["spec"]
    assert 1 <= budget["maxUnavailable"] < replicas
    assert "minAvailable" not in budget


def test_resources(container: Object, options: Object) -> None:
    resources = container["resources"]
    assert "cpu" in resources["requests"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    budgets = size_bytes(options["adapter_memory"]) + size_bytes(options["kv_memory"])
    assert size_bytes(resources["limits"]["memory"]) >= budgets + RUNTIME_BYTES


def test_threads_follow_the_cpu_request(container: Object) -> None:
    (threads,) = (item for item in container["env"] if item["name"] == "OMP_NUM_THREADS")
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "requests.cpu"


# Confinement


def test_the_pod_meets_the_restricted_standard(pod: Object, container: Object) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_the_user_is_the_one_of_the_image(pod: Object) -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    context = pod["securityContext"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
    assert context["fsGroup"] == context["runAsGroup"]


def test_only_cache_and_tmp_are_writable_and_both_are_bounded(container: Object, objects: list[Object]) -> None:
    volumes = volumes_of(objects)
    writable = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"] if not m.get("readOnly")}
    assert set(writable) == {"/cache", "/tmp"}
    for volume in writable.values():
        assert size_bytes(volume["emptyDir"]["sizeLimit"]) > 0


def test_keys_are_not_world_readable(objects: list[Object]) -> None:
    for volume in volumes_of(objects).values():
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440
