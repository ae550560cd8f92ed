"""iLoRA's gate for one adapter: what a request says of its user becomes the factors ω of the experts.

    history → SASRec → state → router → ω      user_embedding → router → ω      weights = ω

Must not know: HTTP, engines, slots, tokens. Nothing a request gives is corrected, cut or normalised: what cannot be
used as it is is refused, naming the field.

Shapes: N requests, K experts, d width of the base's input embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from motet.adapters.effects import GateSpec
from motet.adapters.errors import GateError
from motet.adapters.gates.projector import Projector
from motet.adapters.gates.router import Router
from motet.adapters.gates.sasrec import WIDTH, Sasrec

KIND = "router"
SUM_TOLERANCE = 1e-3
"""Of given weights around one: what writing them with four decimals costs, with room."""


@dataclass(frozen=True, slots=True)
class UserInput:
    """What a request says of its user: exactly one of the fields.

    Attributes:
        history: item ids, oldest first.
        user_embedding: a state of 64 numbers, as SASRec gives it.
        weights: ω itself, K numbers.
    """

    history: Sequence[int] | None = None
    user_embedding: Sequence[float] | None = None
    weights: Sequence[float] | None = None


class InstanceGate:
    """The networks of one adapter's gate.

    Args:
        spec: of kind "router"; its tensors are named `sasrec.…`, `router.…` and `projector.…`.

    Raises:
        FormatError: the tensors are not those of the networks.

    Note: immutable after construction; any thread may call it.
    """

    def __init__(self, spec: GateSpec) -> None:
        assert spec.kind == KIND, spec.kind
        self.experts = spec.size
        self.bytes = spec.bytes
        self.items: int = spec.facts["items"]
        self.history_length: int = spec.facts["history_length"]
        self.placeholders: Mapping[str, str] = spec.facts["placeholders"]
        self._sasrec = Sasrec(part(spec.tensors, "sasrec"), self.items, self.history_length)
        self._router = Router(part(spec.tensors, "router"), self.experts)
        projector = part(spec.tensors, "projector")
        self._projector = Projector(projector, spec.facts["width"]) if projector else None

    @property
    def has_projector(self) -> bool:
        """Whether items can stand for placeholder tokens."""
        return self._projector is not None

    def factors(self, users: Sequence[UserInput]) -> torch.Tensor:
        """ω of each request.

        Returns:
            [N, K] float32, not negative; each row sums to one, given weights to within 1e-3.

        Raises:
            GateError: a request gives none or several of the fields, or one that cannot be used.

        Note: rows are computed one by one, so that equal users have equal factors, bit by bit, whatever their company:
            key-value blocks are shared between requests of equal factors.
        """
        if not users:
            return torch.empty(0, self.experts)
        return torch.stack([self._factors(user) for user in users])

    def item_rows(self, ids: Sequence[int], field: str = "items") -> torch.Tensor:
        """Input embeddings of the base for items, in the place of placeholder tokens.

        Args:
            field: of the request, for errors.

        Returns:
            [n, d] float32.

        Raises:
            GateError: the adapter has no projector, or an id is no item's.
        """
        if self._projector is None:
            raise GateError(
                field,
                "the adapter has no projector, so no item can stand for a placeholder; write the items as text, or "
                "convert a checkpoint that has its projector",
            )
        self._require_items(field, ids)
        return self._projector.rows(self._sasrec.items(ids))

    def _factors(self, user: UserInput) -> torch.Tensor:
        given = [name for name in ("history", "user_embedding", "weights") if getattr(user, name) is not None]
        if len(given) != 1:
            raise GateError(
                given[1] if given else "history",
                f"the request gives {' and '.join(given) or 'nothing'} for the gate; give exactly one of history, "
                "user_embedding and weights",
            )
        if user.weights is not None:
            return self._given(user.weights)
        if user.history is not None:
            state_1D = self._sasrec.states([self._history(user.history)])
        else:
            assert user.user_embedding is not None
            state_1D = _embedding(user.user_embedding)[None]
        omega_K = self._router.factors(state_1D)[0]
        if not bool(torch.isfinite(omega_K).all()):
            raise GateError(given[0], f"{given[0]} gives factors that are not finite; its numbers are too large")
        return omega_K

    def _history(self, history: Sequence[int]) -> Sequence[int]:
        if not 1 <= len(history) <= self.history_length:
            raise GateError(
                "history",
                f"history has {len(history)} items; the adapter reads 1 to {self.history_length}: give the last ones",
            )
        self._require_items("history", history)
        return history

    def _require_items(self, field: str, ids: Sequence[int]) -> None:
        for place, item in enumerate(ids):
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < self.items:
                padding = " is the padding's id" if item == self.items else " is no item"
                raise GateError(
                    field, f"{field}[{place}]={item!r}{padding}; items are 0 to {self.items - 1}: leave it out"
                )

    def _given(self, weights: Sequence[float]) -> torch.Tensor:
        _require_numbers("weights", weights, self.experts)
        if negative := [weight for weight in weights if weight < 0]:
            raise GateError("weights", f"weights has the negative number {negative[0]!r}; each is at least 0")
        if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            raise GateError(
                "weights",
                f"weights sums to {math.fsum(weights):.6g}, not to 1 within {SUM_TOLERANCE}; divide them by their sum",
            )
        return torch.tensor([float(weight) for weight in weights])


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of one network, without its name before theirs."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _embedding(values: Sequence[float]) -> torch.Tensor:
    _require_numbers("user_embedding", values, WIDTH)
    return torch.tensor([float(value) for value in values])


def _require_numbers(field: str, values: Sequence[float], count: int) -> None:
    """Require `count` numbers that are finite in float32."""
    if len(values) != count:
        raise GateError(field, f"{field} has {len(values)} numbers; the adapter takes exactly {count}")
    largest = torch.finfo(torch.float32).max
    for place, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= largest:
            raise GateError(field, f"{field}[{place}]={value!r} is not a finite number of float32; correct it")
