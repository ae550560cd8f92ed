"""The part that all methods saved as a PEFT LoRA folder share: which linears, which scale, DoRA, biases.

Must not know: what a saved pair means; each method says that by the function it hands in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank, OutputBias, OutputScale, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, NonFiniteError, UnsupportedError, listed
from motet.adapters.methods.peft_config import PeftLoraConfig
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

ReadPair = Callable[[Target, TensorBag], LowRank]
"""Takes a target's tensors out of the bag and gives the whole low-rank change of the base, scale folded."""


def trained_pair(target: Target, config: PeftLoraConfig, bag: TensorBag) -> LowRank:
    """The saved A and B, with the scale folded into B."""
    stem, rank = PREFIX + target.name, config.rank(target.name)
    a_RI = bag.take(f"{stem}.lora_A.weight", (rank, target.in_width))
    b_OR = bag.take(f"{stem}.lora_B.weight", (target.out_width, rank))
    return LowRank(a_RI, b_OR * config.scale(target.name))


def lower_folder(
    files: AdapterFiles, base: BaseModel, config: PeftLoraConfig, read_pair: ReadPair, *, method: str, form: str
) -> Lowered:
    """Lower every target the configuration names, and require that no tensor is left.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    bag = TensorBag(files.tensors)
    expected = config.expected_targets(base)
    found = bag.modules_with(".lora_A.weight", ".lora_B.weight")
    if absent := expected - found:
        raise MissingTensorError(
            f"target_modules names {len(expected)} linear layers of {base.name!r}, but {len(absent)} have no tensors: "
            f"{listed(absent)}; the adapter belongs to another base model or was saved incompletely"
        )
    effects = {
        name: _lower_target(base.targets[name], config, bag, base, read_pair)
        for name in base.targets
        if name in expected
    }
    if config.bias == "all":
        for name in (bag.modules_with(".bias") & base.targets.keys()) - effects.keys():
            if base.targets[name].has_bias:
                effects[name] = TargetEffects(bias=_replaced_bias(base.targets[name], bag, base))
    overlays = _saved_modules(config, bag, base)
    _refuse_known_leftovers(bag)
    bag.require_empty()
    if not effects:
        raise ConfigError(f"target_modules={config.target_modules!r} names no linear layer of {base.name!r}")
    return Lowered(
        method=method,
        form=form,
        scaling=config.scaling_rule,
        effects=effects,
        expected_targets=len(expected),
        overlays=overlays,
    )


def _saved_modules(config: PeftLoraConfig, bag: TensorBag, base: BaseModel) -> dict[str, torch.Tensor]:
    """Modules that were trained as a whole; each name of a tied parameter is a module of its own, as in PEFT."""
    overlays: dict[str, torch.Tensor] = {}
    for path in sorted({*base.parameter_names, *base.tied}):
        parts = path.split(".")
        modules = (".".join(parts[:stop]) for stop in range(1, len(parts)))
        if any(module.endswith(name) for module in modules for name in config.modules_to_save):
            overlays[path] = bag.take(PREFIX + path, tuple(base.parameter(path).shape))
    unknown = [name for name in config.modules_to_save if not any(f"{name}." in f"{path}." for path in overlays)]
    if unknown:
        raise UnsupportedError(
            f"modules_to_save names {unknown[0]!r}, which {base.name!r} has not; it cannot be served"
        )
    if stuck := overlays.keys() - base.replaceable:
        raise UnsupportedError(f"modules_to_save names {listed(stuck, 1)}, which cannot be replaced for single rows")
    return overlays


def _lower_target(
    target: Target, config: PeftLoraConfig, bag: TensorBag, base: BaseModel, read_pair: ReadPair
) -> TargetEffects:
    low_rank = read_pair(target, bag)
    scale = None
    if config.use_dora:
        magnitude_O = bag.take(f"{PREFIX}{target.name}.lora_magnitude_vector", (target.out_width,))
        norm_O = torch.linalg.vector_norm(base.weight(target.name) + low_rank.b_OR @ low_rank.a_RI, dim=1)
        scale = OutputScale(magnitude_O / norm_O - 1)
        if not bool(torch.isfinite(scale.delta_O).all()):
            raise NonFiniteError(f"DoRA divides by zero on {target.name!r}: W + s·B A has a row of zeros; exclude it")
    return TargetEffects(low_rank, scale, _bias(target, config, bag, base))


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
    if embedded := bag.modules_with(".lora_embedding_A", ".lora_embedding_B"):
        raise UnsupportedError(f"LoRA on the embedding {listed(embedded, 1)} is not served; re-train without it")
    if unscaled := bag.modules_with(".lora_magnitude_vector"):
        raise ConfigError(f"{listed(unscaled, 1)} has a DoRA magnitude but use_dora is not set; correct the config")
