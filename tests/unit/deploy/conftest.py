"""The manifests as the real kustomize renders them."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy import kubectl
from tests.unit.deploy.objects import (
    MANIFESTS,
    Object,
    configmaps,
    literal_env,
    mount_of,
    of_kind,
    volumes_of,
)


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
