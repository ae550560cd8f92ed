"""The manifests, rendered by the real kustomize: schemas, and what no schema can see."""

from __future__ import annotations

import base64
import dataclasses
import re
import tomllib
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.unit.deploy.objects import (
    CONFIGMAP_LIMIT_BYTES,
    KUBERNETES_VERSIONS,
    MANIFESTS,
    OUTSIDE_SECRETS,
    ROOT,
    Object,
    configmaps,
    keys_in,
    literal_env,
    mount_of,
    of_kind,
    volumes_of,
)


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
