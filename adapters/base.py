"""What adapters may know of the resident base model: its targets, their weights, a fingerprint.

Must not know: text, attention, where the weights live. A vision transformer is a base too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from motet.adapters.tokens import Tokenizers


class Kind(enum.Enum):
    """What the rows of a target are."""

    LINEAR = "linear"
    """One for every row of a step."""
    EMBEDDING = "embedding"
    """Indices: it is the linear W^T [width, vocabulary] over one-hot rows; its columns are the tokens."""
    HEAD = "head"
    """Only those whose logits are needed; its outputs are the tokens."""


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the base that adapters can act on: a linear, the output head, the input embedding.

    Attributes:
        index: position in `BaseModel.targets`, the addresses' first axis; those that are no linears come last.
        name: module path in the base model, e.g. "model.layers.0.self_attn.q_proj".
    """

    index: int
    name: str
    in_width: int
    out_width: int
    has_bias: bool
    kind: Kind = Kind.LINEAR


@dataclass(frozen=True, slots=True, eq=False)
class BaseModel:
    """The resident base, as adapters see it.

    Attributes:
        name: what people call it.
        fingerprint: hexadecimal digest of architecture and weights.
        targets: name → target, in index order.
        other_modules: paths of the modules with parameters that are not targets, for error messages.
        weight: target name → W [O, I] as float32 on the CPU; of an embedding the transposed parameter.
        bias: target name → c [O] as float32 on the CPU; only for targets with a bias.
        weight_norm: target name → ‖W‖ (Frobenius), remembered.
        parameter_names: every parameter of the model, those of the targets too; a tied one has its first name only.
        parameter: name → values as float32 on the CPU; also for the other names of tied ones.
        tied: other name → first name, of parameters that several modules share.
        replaceable: names, other names too, of the parameters that an overlay may replace.
        tokenizers: None for a base without text.
        no_targets: path of a head or embedding that is no target → why.
        config: its configuration as plain data, every key of its class; empty where it has none.
        read_config: another configuration as the same class reads it, with its defaults; raises anything on nonsense.
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
    no_targets: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Tokenizers | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    read_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def of_kind(self, kind: Kind) -> Target | None:
        """The first target of a kind; there is at most one embedding and one head."""
        return next((target for target in self.targets.values() if target.kind is kind), None)

    @property
    def feature_width(self) -> int | None:
        """How wide the states are that the output head reads; None where the base has none."""
        head = self.of_kind(Kind.HEAD)
        return self.config.get("hidden_size") if head is None else head.in_width

    def is_tied(self, parameter: str) -> bool:
        """Whether several modules share the parameter."""
        return parameter in self.tied or parameter in self.tied.values()
