"""One set of official files, and what they mean; and how weights are made to look trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from motet.adapters.spec import Declared

CHANGE = 0.06
"""‖ΔW‖/‖W‖ of what looks trained: official runs move weights by a few per cent."""


@dataclass(frozen=True)
class Layout:
    """A folder as somebody would publish it.

    Attributes:
        folder: what is loaded.
        oracle: a causal language model with the adapter's behaviour, `forward` and `generate`.
        method: the name that the importer must report.
        declared: what has to be said beside the folder.
        deltas_OI: target → ΔW [O, I] float64 on the original base; only of the low-rank part.
    """

    folder: Path
    oracle: Any
    method: str
    declared: Declared = field(default_factory=Declared)
    deltas_OI: Mapping[str, torch.Tensor] = field(default_factory=dict)


def family_name(config: Any) -> str:
    """What a plain adapter of this configuration is called."""
    name = "rslora" if config.use_rslora else "lora"
    return ("dora" if name == "lora" else "rslora+dora") if config.use_dora else name


def read_back(model: Any, folder: Path, **config: Any) -> Any:
    """PEFT's model of the adapter on a copy of `model`, with entries of its configuration replaced."""
    written = PeftConfig.from_pretrained(str(folder))
    for key, value in config.items():
        setattr(written, key, value)
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder), config=written).eval()


def lora_layers(peft_model: Any) -> Iterator[tuple[str, Any]]:
    """(target name in the base, PEFT's layer) of every adapted linear."""
    for path, module in peft_model.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            yield path.removeprefix("base_model.model."), module


def products(peft_model: Any) -> dict[str, torch.Tensor]:
    """Target → s·B A as it is now, [O, I] float64; of an embedding [width, vocabulary]."""
    linears = {
        name: (layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in lora_layers(peft_model)
    }
    embeddings = {
        path.removeprefix("base_model.model."): (
            module,
            module.lora_embedding_A["default"],
            module.lora_embedding_B["default"],
        )
        for path, module in peft_model.named_modules()
        if "default" in getattr(module, "lora_embedding_A", ())
    }
    return {
        name: layer.scaling["default"] * (b_OR.detach().double() @ a_RI.detach().double())
        for name, (layer, a_RI, b_OR) in {**linears, **embeddings}.items()
    }


@torch.no_grad()
def look_trained(peft_model: Any, base: Any, seed: int, change: float = CHANGE) -> None:
    """Move both factors of every pair so that s·B A moves by `change`·‖W‖, or at most by half their own size.

    Magnitudes of DoRA and trained biases move as well.

    Args:
        peft_model: at its initial weights; changed in place.
        base: the untouched base model, for ‖W‖.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(peft_model):
        a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        step_RI = torch.randn(a_RI.shape, generator=generator) * a_RI.square().mean().sqrt()
        step_OR = torch.randn(b_OR.shape, generator=generator) * b_OR.square().mean().sqrt()
        moved_OI = layer.scaling["default"] * (step_OR @ a_RI + b_OR @ step_RI)
        wanted = change * torch.linalg.vector_norm(base.get_submodule(name).weight)
        size = min(0.5, float(wanted / torch.linalg.vector_norm(moved_OI)))
        a_RI.add_(size * step_RI)
        b_OR.add_(size * step_OR)
    for name, parameter in peft_model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias") and parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
