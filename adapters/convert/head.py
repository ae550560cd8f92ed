"""Converts the state dict of a vbll last layer to the head files that lie beside an adapter.

Must not know: servers, how a head answers. Runs offline. Nothing is computed: the tensors keep vbll's names and, as
float32, their bits; what they mean is declared, as the names do not tell a diagonal from another `W_logdiag`.

Source: the state dicts of vbll 0.4.9 (`vbll/layers/classification.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from motet.adapters.bounded import DEFAULT_LIMITS, parse_tensors, read_file
from motet.adapters.convert.plain_pickle import read_pickled_tensors
from motet.adapters.errors import ConfigError, NonFiniteError, UnsupportedError, listed
from motet.adapters.heads import HeadFile, Parameterization, write

NOT_SERVED: Mapping[str, tuple[str, str]] = {
    "noise_log_dof": (
        "tDiscClassification",
        "its logits follow Student's t, for which the exact answer is not Gaussian",
    ),
    "M_mean": ("HetClassification", "the noise of its logits depends on the input through a second random layer"),
    "mu_mean": (
        "GenClassification",
        "it gives densities of the feature, whose entropy has no epistemic part to report",
    ),
}
"""A tensor that tells the layer → the layer, and why it is refused."""


def vbll_head(
    state_file: Path,
    out_folder: Path,
    parameterization: Parameterization,
    labels: tuple[str, ...],
    *,
    prefix: str = "",
    **facts: Any,
) -> HeadFile:
    """Write the head files of a `vbll.DiscClassification`.

    Args:
        state_file: its state dict, safetensors or a pickle, from which only tensors are read.
        out_folder: usually the adapter's; it must have no head yet.
        labels: of the classes, in the order of training.
        prefix: what stands before the layer's names in the state dict of a larger model; other names are left out.
        facts: other fields of `HeadFile`.

    Raises:
        UnsafeFormatError: the pickle holds more than tensors.
        UnsupportedError: it is another kind of layer.
        FormatError: it is not a head of this parameterization with as many labels.
        AdapterExistsError: `out_folder` has a head.
    """
    state = _read(state_file)
    if prefix and not any(name.startswith(prefix) for name in state):
        raise ConfigError(f"{state_file.name} has no name that starts with {prefix!r}; it has {listed(state)}")
    layer = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for name, (kind, reason) in NOT_SERVED.items():
        if name in layer:
            raise UnsupportedError(
                f"{name!r} is of a {kind} layer, which is not served: {reason}; use DiscClassification"
            )
    head = HeadFile(
        parameterization=parameterization,
        labels=labels,
        tensors={name: _single(name, tensor) for name, tensor in layer.items()},
        **facts,
    )
    write(head, out_folder)
    return head


def _read(file: Path) -> Mapping[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return parse_tensors(file.name, read_file(file.parent, file.name, DEFAULT_LIMITS.weights_bytes), DEFAULT_LIMITS)
    return read_pickled_tensors(file)


def _single(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, by itself in memory."""
    if not tensor.is_floating_point():
        raise ConfigError(f"tensor {name!r} is {tensor.dtype}, not of floating point; it is no vbll layer")
    single = tensor.detach().float().clone(memory_format=torch.contiguous_format)
    if tensor.isfinite().all() and not single.isfinite().all():
        raise NonFiniteError(f"tensor {name!r} holds numbers that are too large for float32; train the head again")
    return single
