"""iLoRA's router: a small residual network over a user's state, read as a signal of 64 samples, and a softmax.

    y = relu(BN(conv(z)))                                    1 → 16 channels
    y = relu(BN(conv(relu(BN(conv(y))))) + shortcut(y))      9 times; 16, 32, 64 channels by threes
    ω = softmax(W mean(y) + b)                               mean over samples

The first block of the second and third three has stride 2: its shortcut takes every second sample, and channels of
zeros on either side. Batch norm is that of evaluation, so it folds into the convolution before it:

    BN(conv(y)) = conv'(y) + β - s μ,   s = γ / √(σ² + 1e-5),   conv' = s·conv

A checkpoint of the official kind `part` has no μ and σ²; the official code then evaluates with 0 and 1, and so do we.

Must not know: adapters, requests, where the state comes from. Every tensor is float32 on the CPU; a row does not depend
on its neighbours.

Shapes: N users, C channels, L samples, K experts.

Source: https://arxiv.org/abs/2408.10135 and the shapes its code saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from motet.adapters.errors import NonFiniteError
from motet.adapters.gates.weights import checked

SAMPLES = 64
CHANNELS = (16, 32, 64)
BLOCKS = 3
"""Per number of channels."""
EPSILON = 1e-5
"""torch's default, which the official code leaves."""
MEAN, VARIANCE, COUNTER = ".running_mean", ".running_var", ".num_batches_tracked"


def blocks() -> Iterator[tuple[str, int, int]]:
    """Name, input channels and output channels of every residual block."""
    before = CHANNELS[0]
    for stage, channels in enumerate(CHANNELS, 1):
        for number in range(BLOCKS):
            yield f"layer{stage}.{number}", before, channels
            before = channels


def shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, statistics of batch norm included."""
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (CHANNELS[0], 1, 3), **_norm_shapes("bn1", CHANNELS[0])}
    for name, before, channels in blocks():
        found[f"{name}.conv1.weight"] = (channels, before, 3)
        found[f"{name}.conv2.weight"] = (channels, channels, 3)
        found |= _norm_shapes(f"{name}.bn1", channels) | _norm_shapes(f"{name}.bn2", channels)
    return {**found, "gate.fc.weight": (experts, CHANNELS[-1]), "gate.fc.bias": (experts,)}


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {name + part: (channels,) for part in (".weight", ".bias", MEAN, VARIANCE)}


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of batch norm."""
    return name.endswith((MEAN, VARIANCE))


class Router:
    """The network in evaluation.

    Args:
        tensors: name → weight, as `shapes` says; running statistics may be absent, all together.
        experts: K.

    Raises:
        FormatError: the tensors are not exactly those.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], experts: int) -> None:
        expected = shapes(experts)
        weights = checked("router", tensors, expected, optional=[name for name in expected if is_statistic(name)])
        self._convolutions = {"conv1": _folded(weights, "conv1", "bn1")}
        for name, _, _ in blocks():
            for number in (1, 2):
                path = f"{name}.conv{number}"
                self._convolutions[path] = _folded(weights, path, f"{name}.bn{number}")
        self._last = weights["gate.fc.weight"], weights["gate.fc.bias"]

    def factors(self, state_NL: torch.Tensor) -> torch.Tensor:
        """ω [N, K] of user states [N, 64]."""
        y_NCL = self._convolve("conv1", state_NL[:, None]).relu()
        for name, before, channels in blocks():
            stride = 1 if before == channels else 2
            inner_NCL = self._convolve(f"{name}.conv1", y_NCL, stride).relu()
            added = channels - before
            shortcut_NCL = F.pad(y_NCL[:, :, ::stride], (0, 0, added // 2, (added + 1) // 2))
            y_NCL = (self._convolve(f"{name}.conv2", inner_NCL) + shortcut_NCL).relu()
        return F.linear(y_NCL.mean(-1), *self._last).softmax(-1)

    def _convolve(self, name: str, x_NCL: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight, bias = self._convolutions[name]
        return F.conv1d(x_NCL, weight, bias, stride=stride, padding=1)


def _folded(weights: Mapping[str, torch.Tensor], convolution: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution with the batch norm after it, summed in float64."""
    gamma_C, beta_C = weights[f"{norm}.weight"].double(), weights[f"{norm}.bias"].double()
    mean_C = weights[norm + MEAN].double() if norm + MEAN in weights else torch.zeros_like(gamma_C)
    variance_C = weights[norm + VARIANCE].double() if norm + VARIANCE in weights else torch.ones_like(gamma_C)
    if bool((variance_C < 0).any()):
        raise NonFiniteError(f"tensor 'router.{norm}{VARIANCE}' holds a negative variance; the file is damaged")
    scale_C = gamma_C / (variance_C + EPSILON).sqrt()
    folded = weights[f"{convolution}.weight"].double() * scale_C[:, None, None]
    return folded.float(), (beta_C - scale_C * mean_C).float()
