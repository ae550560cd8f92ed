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

    def take_index(self, name: str, width: int) -> torch.Tensor:
        """Remove a list of distinct places below `width` and return it as int64.

        Raises:
            MissingTensorError: there is none of that name.
            ShapeError: it is no list of whole numbers, a place stands twice, or one is out of range.
        """
        index_S = self._left.pop(name, None)
        if index_S is None:
            raise MissingTensorError(f"tensor {name!r} is missing; the adapter is incomplete: save it again")
        if index_S.dim() != 1 or index_S.dtype not in (torch.int32, torch.int64) or len(index_S) == 0:
            raise ShapeError(
                f"tensor {name!r} has shape {list(index_S.shape)} and dtype {index_S.dtype}; it must be a list of "
                "int32 or int64 places, at least one"
            )
        if int(index_S.min()) < 0 or int(index_S.max()) >= width:
            raise ShapeError(
                f"tensor {name!r} names places {int(index_S.min())} to {int(index_S.max())}; there are 0 to "
                f"{width - 1}: the adapter belongs to another base model"
            )
        if len(set(index_S.tolist())) != len(index_S):
            raise ShapeError(f"tensor {name!r} names a place twice; which of the two changes counts cannot be told")
        return index_S.long()

    def take_if_present(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """As `take`, but None when there is no such tensor."""
        return self.take(name, shape) if name in self._left else None

    def rows(self, name: str) -> int | None:
        """How many rows the tensor has; None when there is none of that name left, or it has no rows."""
        tensor = self._left.get(name)
        return None if tensor is None or tensor.dim() == 0 else tensor.shape[0]

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
