"""Takes tensors out of an adapter file by rule, so that what no rule takes is found.

Must not know: configurations, scales, methods.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from motet.adapters.errors import MissingTensorError, NonFiniteError, ShapeError, UnmatchedTensorError, listed

PREFIX = "base_model.model."
"""What PEFT puts in front of every module path."""


class TensorBag:
    """The tensors of one adapter file, each of which must be taken exactly once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._left = dict(tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Remove a tensor and return it as finite float32.

        Raises:
            MissingTensorError: there is none of that name.
            ShapeError: it has another shape.
            NonFiniteError: it holds NaN or infinity.
        """
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise MissingTensorError(f"tensor {name!r} is missing; the adapter is incomplete: save it again")
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}; "
                "the adapter belongs to another base model or its rank is configured wrongly"
            )
        if not tensor.is_floating_point():
            raise ShapeError(f"tensor {name!r} has dtype {tensor.dtype}; adapters are floating point")
        values = tensor.to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"tensor {name!r} holds NaN or infinity; the training diverged or the file is damaged")
        return values

    def take_if_present(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """As `take`, but None when there is no such tensor."""
        return self.take(name, shape) if name in self._left else None

    def modules_with(self, *endings: str) -> frozenset[str]:
        """Module paths for which a tensor with one of these endings is left."""
        return frozenset(
            name.removeprefix(PREFIX).removesuffix(ending)
            for name in self._left
            for ending in endings
            if name.startswith(PREFIX) and name.endswith(ending)
        )

    def require_empty(self, hint: str = "") -> None:
        """Raise UnmatchedTensorError when a tensor was taken by no rule."""
        if self._left:
            raise UnmatchedTensorError(
                f"{len(self._left)} tensors match no rule: {listed(self._left)}; applying the rest would give wrong "
                f"answers, so the adapter is refused{hint}"
            )
