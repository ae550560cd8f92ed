"""The part that all methods saved as a PEFT LoRA folder share: which linears, which scale, DoRA, biases.

Must not know: what a saved pair means; each method says that by the function it hands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import Lowered, LowRank, OutputBias, OutputScale, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, NonFiniteError, UnsupportedError, listed
from motet.adapters.methods.peft_config import PeftLoraConfig
from motet.adapters.methods.peft_tokens import new_ends
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.methods.vocabulary import end_paths, lower_ends, meant_rows, served_vocabulary
from motet.adapters.source import AdapterFiles
from motet.adapters.tokens import OwnTokenizer, own_tokenizer

ReadPair = Callable[[Target, TensorBag], LowRank]
"""Takes a target's tensors out of the bag and gives the whole low-rank change of the base, scale folded."""


PAIR = {
    Kind.LINEAR: (".lora_A.weight", ".lora_B.weight"),
    Kind.HEAD: (".lora_A.weight", ".lora_B.weight"),
    Kind.EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
}
"""What the names of a pair's tensors end in."""


def trained_pair(target: Target, config: PeftLoraConfig, bag: TensorBag) -> LowRank:
    """The saved A and B, with the scale folded into B."""
    stem, rank = PREFIX + target.name, config.rank(target.name)
    a_name, b_name = PAIR[target.kind]
    a_RI = bag.take(stem + a_name, (rank, target.in_width))
    b_OR = bag.take(stem + b_name, (target.out_width, rank))
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
    found = bag.modules_with(*(ending for endings in PAIR.values() for ending in endings))
    if absent := expected - found:
        raise MissingTensorError(
            f"target_modules names {len(expected)} linear layers of {base.name!r}, but {len(absent)} have no tensors: "
            f"{listed(absent)}; the adapter belongs to another base model or was saved incompletely"
        )
    own = own_tokenizer(files.tokenizer, base.tokenizers)
    overlays = _saved_modules(config, bag, base, own)
    ends = new_ends(config, bag, base, expected)
    if twice := {name for name in ends if f"{name}.weight" in overlays}:
        raise ConfigError(f"modules_to_save and other tensors both replace {listed(twice, 1)}; save the adapter again")
    effects = {
        name: _lower_target(base.targets[name], config, bag, base, read_pair, ends)
        for name in base.targets
        if name in expected
    }
    meant = {id(values_ND): meant_rows(path, values_ND, base, own) for path, values_ND in ends.items()}
    ends = {path: meant[id(values_ND)] for path, values_ND in ends.items()}
    of_ends, whole_ends = lower_ends(ends, base)
    overlays |= whole_ends
    for name, sparse in of_ends.items():
        effects[name] = replace(effects.get(name, TargetEffects()), columns=sparse.columns, rows=sparse.rows)
    if config.bias == "all":
        for name in (bag.modules_with(".bias") & base.targets.keys()) - effects.keys():
            if base.targets[name].has_bias:
                effects[name] = TargetEffects(bias=_replaced_bias(base.targets[name], bag, base))
    if stuck := overlays.keys() - base.replaceable:
        raise UnsupportedError(f"the adapter replaces {listed(stuck, 1)}, which cannot be done for single rows")
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
        vocabulary=served_vocabulary({**ends, **_ends_of(overlays, base)}, base, own),
    )


def _ends_of(overlays: Mapping[str, torch.Tensor], base: BaseModel) -> dict[str, torch.Tensor]:
    return {path: overlays[f"{path}.weight"] for path in end_paths(base) if f"{path}.weight" in overlays}


def _saved_modules(
    config: PeftLoraConfig, bag: TensorBag, base: BaseModel, own: OwnTokenizer | None
) -> dict[str, torch.Tensor]:
    """Modules that were trained as a whole; each name of a tied parameter is a module of its own, as in PEFT."""
    overlays: dict[str, torch.Tensor] = {}
    ends = {f"{path}.weight" for path in end_paths(base)}
    for path in sorted({*base.parameter_names, *base.tied}):
        parts = path.split(".")
        modules = (".".join(parts[:stop]) for stop in range(1, len(parts)))
        if any(module.endswith(name) for module in modules for name in config.modules_to_save):
            shape = tuple(base.parameter(path).shape)
            if path not in ends:
                overlays[path] = bag.take(PREFIX + path, shape)
                continue
            values_ND = bag.take(PREFIX + path, (max(shape[0], bag.rows(PREFIX + path) or 0), *shape[1:]))
            overlays[path] = meant_rows(path.removesuffix(".weight"), values_ND, base, own).contiguous()
    unknown = [name for name in config.modules_to_save if not any(f"{name}." in f"{path}." for path in overlays)]
    if unknown:
        raise UnsupportedError(
            f"modules_to_save names {unknown[0]!r}, which {base.name!r} has not; it cannot be served"
        )
    if stuck := overlays.keys() - base.replaceable:
        raise UnsupportedError(f"modules_to_save names {listed(stuck, 1)}, which cannot be replaced for single rows")
    return overlays


def _lower_target(
    target: Target,
    config: PeftLoraConfig,
    bag: TensorBag,
    base: BaseModel,
    read_pair: ReadPair,
    ends: dict[str, torch.Tensor],
) -> TargetEffects:
    """The effects of a target.

    Args:
        ends: new weights [N, D] of the embedding and the head; the rows of added tokens take their part of the pair in.
    """
    trained, weight_OI = target, None
    if (end_ND := ends.get(target.name)) is not None:
        weight_OI = end_ND.T if target.kind is Kind.EMBEDDING else end_ND
        trained = replace(target, out_width=weight_OI.shape[0], in_width=weight_OI.shape[1])
    low_rank = read_pair(trained, bag)
    scale = None
    if config.use_dora:
        magnitude_O = bag.take(f"{PREFIX}{target.name}.lora_magnitude_vector", (trained.out_width,))
        weight_OI = base.weight(target.name) if weight_OI is None else weight_OI
        norm_O = torch.linalg.vector_norm(weight_OI + low_rank.b_OR @ low_rank.a_RI, dim=1)
        scale = OutputScale(magnitude_O / norm_O - 1)
        if not bool(torch.isfinite(scale.delta_O).all()):
            raise NonFiniteError(f"DoRA divides by zero on {target.name!r}: W + s·B A has a row of zeros; exclude it")
    if trained != target:
        ends[target.name] = _with_change(ends[target.name], target, low_rank, scale)
        low_rank = LowRank(low_rank.a_RI[:, : target.in_width], low_rank.b_OR[: target.out_width])
        scale = None if scale is None else OutputScale(scale.delta_O[: target.out_width])
    return TargetEffects(low_rank, scale, _bias(target, config, bag, base))


def _with_change(end_ND: torch.Tensor, target: Target, low_rank: LowRank, scale: OutputScale | None) -> torch.Tensor:
    """The weight with the pair's part of the added tokens in their rows, so that the pair ends where the base ends.

    Note: a head's scale is in the rows too; an embedding's scale acts on all tokens alike.
    """
    if target.kind is Kind.EMBEDDING:
        known, change_XD = target.in_width, (low_rank.b_OR @ low_rank.a_RI[:, target.in_width :]).T
    else:
        known, change_XD = target.out_width, low_rank.b_OR[target.out_width :] @ low_rank.a_RI
    added_XD = end_ND[known:] + change_XD
    if scale is not None and target.kind is Kind.HEAD:
        added_XD *= 1 + scale.delta_O[known:, None]
    return torch.cat([end_ND[:known], added_XD])


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
    if unscaled := bag.modules_with(".lora_magnitude_vector"):
        raise ConfigError(f"{listed(unscaled, 1)} has a DoRA magnitude but use_dora is not set; correct the config")
