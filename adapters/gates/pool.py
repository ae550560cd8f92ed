"""A pool's gate: one factor for each member, the same for all its targets.

Must not know: HTTP, engines, where the factors come from (`merge` finds them from a support set).
"""

from __future__ import annotations

from collections.abc import Sequence

from motet.adapters.effects import GateSpec
from motet.adapters.errors import GateError
from motet.adapters.gates import merge

KIND = "pool"


class PoolGate:
    """What requests may ask of a pool.

    Args:
        spec: of kind "pool".

    Note: immutable; any thread may call it.
    """

    def __init__(self, spec: GateSpec) -> None:
        assert spec.kind == KIND, spec.kind
        self.members = spec.size
        self.targets = tuple(spec.groups)
        self.bytes = spec.bytes
        self.scale = float(spec.facts["scale_cls"] or 1.0)
        self.bias = float(spec.facts["bias_cls"] or 0.0)

    def member(self, place: int) -> tuple[float, ...]:
        """The factors of one member alone."""
        return tuple(float(place == other) for other in range(self.members))

    def factors(self, weights: Sequence[float] | None) -> tuple[float, ...]:
        """Of explicit weights.

        Raises:
            GateError: there are none, or they are no weights of this pool.
        """
        if weights is None:
            raise GateError(
                "gate",
                f"the adapter is a pool of {self.members} members: give gate.weights, or merge it first and use the "
                "merge's name as model",
            )
        try:
            return tuple(merge.explicit(weights, self.members).tolist())
        except GateError as error:
            raise GateError("weights", str(error)) from error
