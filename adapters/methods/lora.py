"""LoRA, rank-stabilised LoRA and DoRA in PEFT's layout.

    ΔW = s·B A,  s = alpha/r  (rsLoRA: alpha/√r),  r and alpha per module by pattern
    DoRA:  y = k ⊙ (W x + s·B A x) + c,  k_i = m_i / ‖(W + s·B A)_i‖₂   (the bias of the base is not scaled)

Source: https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732, https://arxiv.org/abs/2402.09353 and the
files peft 0.21 writes. PEFT computes DoRA's norm on each forward in the base's dtype; here it is computed once, in
float32.
"""

from __future__ import annotations

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank, OutputBias, OutputScale, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, NonFiniteError, UnsupportedError, listed
from motet.adapters.methods.peft_config import PeftLoraConfig, parse
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

NAME = "lora"


def claims(files: AdapterFiles) -> bool:
    """Whether this method reads the folder: it is the last in the table and takes what names LORA."""
    return files.config.get("peft_type") == "LORA"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Turn the folder into effects on the targets of `base`.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    config = parse(files.config)
    bag = TensorBag(files.tensors)
    expected = config.expected_targets(base)
    found = bag.modules_with(".lora_A.weight", ".lora_B.weight")
    if absent := expected - found:
        raise MissingTensorError(
            f"target_modules names {len(expected)} linear layers of {base.name!r}, but {len(absent)} have no tensors: "
            f"{listed(absent)}; the adapter belongs to another base model or was saved incompletely"
        )
    effects = {name: _lower_target(base.targets[name], config, bag, base) for name in base.targets if name in expected}
    if config.bias == "all":
        for name in (bag.modules_with(".bias") & base.targets.keys()) - effects.keys():
            if base.targets[name].has_bias:
                effects[name] = TargetEffects(bias=_replaced_bias(base.targets[name], bag, base))
    _refuse_known_leftovers(bag)
    bag.require_empty()
    if not effects:
        raise ConfigError(f"target_modules={config.target_modules!r} names no linear layer of {base.name!r}")
    return Lowered(
        method=_method_name(config),
        form="peft",
        scaling=config.scaling_rule,
        effects=effects,
        expected_targets=len(expected),
    )


def _method_name(config: PeftLoraConfig) -> str:
    family = "rslora" if config.use_rslora else "lora"
    return ("dora" if family == "lora" else "rslora+dora") if config.use_dora else family


def _lower_target(target: Target, config: PeftLoraConfig, bag: TensorBag, base: BaseModel) -> TargetEffects:
    stem, rank = PREFIX + target.name, config.rank(target.name)
    a_RI = bag.take(f"{stem}.lora_A.weight", (rank, target.in_width))
    b_OR = bag.take(f"{stem}.lora_B.weight", (target.out_width, rank)) * config.scale(target.name)
    scale_effect = None
    if config.use_dora:
        magnitude_O = bag.take(f"{stem}.lora_magnitude_vector", (target.out_width,))
        norm_O = torch.linalg.vector_norm(base.weight(target.name) + b_OR @ a_RI, dim=1)
        scale_effect = OutputScale(magnitude_O / norm_O - 1)
        if not bool(torch.isfinite(scale_effect.delta_O).all()):
            raise NonFiniteError(f"DoRA divides by zero on {target.name!r}: W + s·B A has a row of zeros; exclude it")
    return TargetEffects(LowRank(a_RI, b_OR), scale_effect, _bias(target, config, bag, base))


def _bias(target: Target, config: PeftLoraConfig, bag: TensorBag, base: BaseModel) -> OutputBias | None:
    """The sum of what `lora_bias` adds inside the product and what `bias` replaces outside of it."""
    parts: list[torch.Tensor] = []
    if config.lora_bias:
        inner_O = bag.take(f"{PREFIX}{target.name}.lora_B.bias", (target.out_width,))
        parts.append(inner_O * config.scale(target.name))
    if config.bias != "none" and target.has_bias:
        parts.append(_replaced_bias(target, bag, base).bias_O)
    return OutputBias(torch.stack(parts).sum(0)) if parts else None


def _replaced_bias(target: Target, bag: TensorBag, base: BaseModel) -> OutputBias:
    """`bias: lora_only` and `all` train the base's own bias: what is saved replaces it."""
    stem, shape = PREFIX + target.name, (target.out_width,)
    saved_O = bag.take_if_present(f"{stem}.base_layer.bias", shape)
    if saved_O is None:
        saved_O = bag.take(f"{stem}.bias", shape)
    return OutputBias(saved_O - base.bias(target.name))


def _refuse_known_leftovers(bag: TensorBag) -> None:
    """Give the tensors whose meaning is known a better message than "matches no rule"."""
    if polar := bag.modules_with(".lora_S.weight", ".lora_S.parametrizations.weight.original"):
        raise UnsupportedError(f"the adapter has lora_S tensors ({listed(polar, 1)}): it is PoLAR, not plain LoRA")
    if embedded := bag.modules_with(".lora_embedding_A", ".lora_embedding_B"):
        raise UnsupportedError(f"LoRA on the embedding {listed(embedded, 1)} is not served; re-train without it")
    if unscaled := bag.modules_with(".lora_magnitude_vector"):
        raise ConfigError(f"{listed(unscaled, 1)} has a DoRA magnitude but use_dora is not set; correct the config")
