"""What adapters may know of the resident base model: its target linears, their weights, a fingerprint.

Must not know: tokens, text, attention, where the weights live. A vision transformer is a base too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of the base that adapters can act on.

    Attributes:
        index: position in `BaseModel.targets`; what the kernels know the target by.
        name: module path in the base model, e.g. "model.layers.0.self_attn.q_proj".
    """

    index: int
    name: str
    in_width: int
    out_width: int
    has_bias: bool


@dataclass(frozen=True, slots=True, eq=False)
class BaseModel:
    """The resident base, as adapters see it.

    Attributes:
        name: what people call it.
        fingerprint: hexadecimal digest of architecture and weights.
        targets: name → target, in index order.
        other_modules: paths of the modules with parameters that are not targets, for error messages.
        weight: target name → W [O, I] as float32 on the CPU.
        bias: target name → c [O] as float32 on the CPU; only for targets with a bias.
        weight_norm: target name → ‖W‖ (Frobenius), remembered.
        parameter_names: every parameter of the model, those of the targets too; a tied one has its first name only.
        parameter: name → values as float32 on the CPU; also for the other names of tied ones.
        tied: other name → first name, of parameters that several modules share.
        replaceable: names, other names too, of the parameters that an overlay may replace.
    """

    name: str
    fingerprint: str
    targets: Mapping[str, Target]
    other_modules: frozenset[str]
    weight: Callable[[str], torch.Tensor]
    bias: Callable[[str], torch.Tensor]
    weight_norm: Callable[[str], float]
    parameter_names: frozenset[str]
    parameter: Callable[[str], torch.Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    replaceable: frozenset[str] = frozenset()
