"""Compares a model directory with the resident base, tensor by tensor.

Must not know: methods. Two copies of one weight differ by at most the rounding of the coarser of their dtypes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from motet.adapters.base import BaseModel
from motet.adapters.errors import (
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    listed,
)
from motet.adapters.source import AdapterFiles

ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Largest relative difference that storing a float32 value in the dtype explains, times two for what is computed."""

SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}
"""Largest absolute difference that storing a value in the dtype explains: float16 has few small numbers."""

COMPUTED = (".rotary_emb.inv_freq",)
"""Endings of buffers that old checkpoints hold and models compute."""


def stored(model: AdapterFiles, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the directory, in its own dtype.

    Raises:
        UnmatchedTensorError: it is missing.
        ShapeError: it has another shape, or a dtype that weights do not have.
        NonFiniteError: it holds NaN or infinity.
    """
    if name not in model.tensors:
        raise UnmatchedTensorError(f"the model directory has no tensor {name!r}; it is not a model of this base")
    values = model.tensors[name]
    if tuple(values.shape) != shape:
        raise ShapeError(f"tensor {name!r} has shape {list(values.shape)}, expected {list(shape)}: it is another model")
    if values.dtype not in ROUNDING:
        raise ShapeError(f"tensor {name!r} has dtype {values.dtype}; weights are float32, bfloat16 or float16")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"tensor {name!r} holds NaN or infinity; the file is damaged")
    return values


def rounding(values: torch.Tensor, base_values: torch.Tensor) -> float:
    """Largest relative difference between two copies of a weight, by the coarser of their dtypes.

    Args:
        values: in its own dtype.
        base_values: float32, of a dtype that its values tell.
    """
    return max(ROUNDING[values.dtype], ROUNDING[_resident_dtype(base_values)])


def alike(values: torch.Tensor, base_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the coarser of their dtypes, so that what was not changed is equal bit for bit."""
    dtype = max(values.dtype, _resident_dtype(base_values), key=ROUNDING.__getitem__)
    return values.to(dtype), base_values.to(dtype)


def _resident_dtype(base_values: torch.Tensor) -> torch.dtype:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(base_values, base_values.to(dtype).float()):
            return dtype
    return torch.float32


def require_base_weights(
    model: AdapterFiles, base: BaseModel, *, changed: Collection[str], replaced: Collection[str] = ()
) -> None:
    """Require that every tensor but the changed ones is the base's own, and that none is missing.

    Args:
        changed: tensors of the directory that need not be the base's.
        replaced: parameters of the base that the changed tensors stand for under other names.

    Raises:
        UnmatchedTensorError, ShapeError: the base has no such parameter.
        MissingTensorError: the directory lacks one of the base's.
        ConfigError: the values differ.
    """
    if absent := base.parameter_names - model.tensors.keys() - set(replaced):
        raise MissingTensorError(
            f"the model directory lacks {listed(absent)} of {base.name!r}; it is incomplete or another model"
        )
    for name in sorted(model.tensors):
        if name in changed or name.endswith(COMPUTED):
            continue
        if name not in base.parameter_names and name not in base.tied:
            raise UnmatchedTensorError(f"the model directory has tensor {name!r}, which {base.name!r} has not")
        expected = base.parameter(name)
        values = stored(model, name, tuple(expected.shape))
        smallest = max(SMALLEST[values.dtype], SMALLEST[_resident_dtype(expected)])
        allowed = rounding(values, expected) * expected.abs() + smallest
        if bool(((values.float() - expected).abs() > allowed).any()):
            raise ConfigError(
                f"tensor {name!r} of the model directory is not that of {base.name!r}: the adapter was trained on "
                "another model, or more was trained than the adapter; serve the model it belongs to"
            )
