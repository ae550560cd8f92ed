"""The pod and its rollout: probes, time to leave, resources, privileges."""

from __future__ import annotations

import re

from tests.unit.deploy.objects import (
    ROOT,
    RUNTIME_BYTES,
    Object,
    of_kind,
    size_bytes,
    volumes_of,
)

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
