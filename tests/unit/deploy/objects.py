"""What the tests of the manifests ask of rendered objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
