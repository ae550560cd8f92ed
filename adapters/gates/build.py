"""Makes the gate that a lowered adapter asks for.

Must not know: requests.
"""

from __future__ import annotations

from motet.adapters.effects import GateSpec
from motet.adapters.gates import instance, pool
from motet.adapters.gates.instance import InstanceGate
from motet.adapters.gates.pool import PoolGate

Gate = InstanceGate | PoolGate


def build(spec: GateSpec) -> Gate:
    """The gate of a spec, ready for requests.

    Raises:
        FormatError: its tensors are not those of its networks.
    """
    kinds: dict[str, type[InstanceGate] | type[PoolGate]] = {instance.KIND: InstanceGate, pool.KIND: PoolGate}
    return kinds[spec.kind](spec)
