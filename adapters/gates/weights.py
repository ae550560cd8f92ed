"""Checks the weights of a gate's small networks: exactly the expected names, shapes and finite values.

Must not know: what the networks compute, which files the weights came from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from motet.adapters.errors import MissingTensorError, NonFiniteError, ShapeError, UnmatchedTensorError, listed


def checked(
    part: str,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The tensors as contiguous float32, once every one of `shapes` is there and no other.

    Args:
        part: what the tensors are of, as it stands before their names.
        tensors: by their names within the part.
        optional: names of `shapes` that may be absent, all of them together or none.

    Raises:
        MissingTensorError, UnmatchedTensorError: a name is absent or not expected.
        ShapeError: a tensor has another shape, or is not floating point.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    if unknown := tensors.keys() - shapes.keys():
        raise UnmatchedTensorError(
            f"{len(unknown)} tensors of the {part} match no rule: {listed(f'{part}.{name}' for name in unknown)}; "
            "applying the rest would give wrong answers: remove what the gate does not use"
        )
    left_out = set(optional) if tensors.keys().isdisjoint(optional) else set()
    if absent := shapes.keys() - left_out - tensors.keys():
        raise MissingTensorError(
            f"{len(absent)} tensors of the {part} are missing: {listed(f'{part}.{name}' for name in absent)}; the gate "
            "cannot be computed without them: save the adapter again"
        )
    return {name: _checked(f"{part}.{name}", tensor, shapes[name]) for name, tensor in tensors.items()}


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}: another network's")
    if not tensor.is_floating_point():
        raise ShapeError(f"tensor {name!r} has dtype {tensor.dtype}; gates are floating point")
    values = tensor.to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"tensor {name!r} holds NaN or infinity; the training diverged or the file is damaged")
    return values
