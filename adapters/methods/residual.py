"""Methods that train on what is left of the base after the adapter's start was taken out of it.

    trained model  W_res + s·B A,  W_res = W - s·B0 A0     hence on the base itself    ΔW = s·(B A - B0 A0)

The shared part of PiSSA, OLoRA, CorDA and LoRA-GA: how the start (B0, A0) is found. And the method of last resort, for
a start that was declared without a known method.

Source: PEFT's `subtract_mutated_init` describes the same identity; it stacks, here the difference is centred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import Lowered, LowRank
from motet.adapters.errors import ConfigError, UnsupportedError, listed
from motet.adapters.methods.base_weights import require_base_weights, rounding, stored
from motet.adapters.methods.centred import aligned, centred
from motet.adapters.methods.peft_config import PeftLoraConfig, init_stem, parse
from motet.adapters.methods.peft_lora import lower_folder, trained_pair
from motet.adapters.methods.principal import leading
from motet.adapters.methods.tensors import TensorBag
from motet.adapters.source import AdapterFiles

NAME = "residual-lora"
METHOD_KEYS = frozenset({"corda_config", "lora_ga_config"})
"""Configuration of how a start was made; how the adapter is applied does not depend on it."""

LEAST_COSINE = 0.5
"""Between trained factors and their start: training moves them little; those of another adapter are orthogonal."""

Recompute = Callable[[Target, PeftLoraConfig, BaseModel], LowRank]
"""The start of a target, from the base alone; the scale is in B."""


def claims(files: AdapterFiles) -> bool:
    """Whether a start was declared that no other method recognised."""
    return files.config.get("peft_type") == "LORA" and (files.initial is not None or files.residual is not None)


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a folder whose start is declared.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    return lower_residual(files, base, NAME, stem=None, recompute=None, missing="")


def lower_residual(
    files: AdapterFiles,
    base: BaseModel,
    method: str,
    *,
    stem: str | None,
    recompute: Recompute | None,
    missing: str,
) -> Lowered:
    """Lower a folder that was trained on a residual of the base.

    Args:
        method: its name.
        stem: the `init_lora_weights` it undoes.
        recompute: its start from the base alone; None where that is impossible.
        missing: why it is impossible, for the refusal.

    Raises:
        UnsupportedError: the start is not given and cannot be recomputed.
        FormatError: the parts do not describe an adapter of this base exactly.
    """
    config = parse(files.config, METHOD_KEYS, stem)
    if files.trained_on_base:
        raise ConfigError(f"trained_on_base contradicts the configuration, which names {method}; drop the declaration")
    if files.initial is not None and files.residual is not None:
        raise ConfigError("both an initial adapter and a residual model are declared; one is enough: drop the residual")
    bag = TensorBag(files.tensors)
    targets = [base.targets[name] for name in sorted(config.expected_targets(base))]
    for target in targets:
        _require_own_weight(target, base)
    trained = {target.name: trained_pair(target, config, bag) for target in targets}
    if files.initial is not None:
        starts, form = _from_initial(files.initial, files, targets), "PEFT folder and initial adapter"
    elif files.residual is not None:
        found = _from_residual(files.residual, targets, config, base)
        starts, form = _aligned(found, trained), "PEFT folder and residual model"
    elif recompute is not None:
        found = {target.name: recompute(target, config, base) for target in targets}
        starts, form = _aligned(found, trained), "PEFT folder, its start recomputed from the base"
        _require_near("B", {name: (trained[name].b_OR, start.b_OR) for name, start in starts.items()}, base)
    else:
        raise UnsupportedError(
            f"{missing}, so what it took out of {base.name!r} cannot be known from this folder; declare the adapter as "
            "it was before training (initial) or the model it was trained on (residual), or convert it to plain LoRA"
        )
    _require_near("A", {name: (trained[name].a_RI, start.a_RI) for name, start in starts.items()}, base)
    changes = {name: centred(trained[name], start) for name, start in starts.items()}

    def read_pair(target: Target, bag: TensorBag) -> LowRank:
        trained_pair(target, config, bag)  # out of the bag
        return changes[target.name]

    name = f"{method}+dora" if config.use_dora else method
    return lower_folder(files, base, config, read_pair, method=name, form=form)


def _require_own_weight(target: Target, base: BaseModel) -> None:
    """Refuse targets of which the residual cannot be told: PEFT changes a head together with what it is tied to."""
    if target.kind is Kind.EMBEDDING:
        raise UnsupportedError(f"target_modules names the embedding {target.name!r}, which has no residual; exclude it")
    if target.kind is Kind.HEAD and base.is_tied(f"{target.name}.weight"):
        raise UnsupportedError(
            f"target_modules names {target.name!r}, whose weight {base.name!r} shares with the embedding: taking a "
            "part out of it changed both, and the adapter holds one; re-train without it"
        )


def _aligned(starts: Mapping[str, LowRank], trained: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name: aligned(start, trained[name]) for name, start in starts.items()}


def _require_near(what: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: BaseModel) -> None:
    """Require that trained factors are near their starts: of all targets together, so that a few may move far."""
    shared = sum(float((one.double() * other.double()).sum()) for one, other in pairs.values())
    sizes = [sum(float(pair[i].double().square().sum()) for pair in pairs.values()) for i in (0, 1)]
    cosine = shared / (sizes[0] * sizes[1]) ** 0.5 if sizes[0] * sizes[1] > 0 else 0.0
    if not cosine >= LEAST_COSINE:
        raise ConfigError(
            f"the trained {what} and that of its start have cosine {cosine:.2f}, below {LEAST_COSINE}: training did "
            f"not begin with this initial adapter, residual model or base ({base.name!r}); declare what it began with"
        )


def _from_initial(initial: AdapterFiles, trained: AdapterFiles, expected: Sequence[Target]) -> dict[str, LowRank]:
    """The pairs of the adapter before training, with that adapter's own scale; its other tensors do not matter."""
    stem = init_stem(initial.config)
    config = parse(initial.config, METHOD_KEYS, stem if stem != "loftq" else None)
    bag = TensorBag(initial.tensors)
    starts = {target.name: trained_pair(target, config, bag) for target in expected}
    if more := bag.modules_with(".lora_A.weight"):
        raise ConfigError(
            f"the initial adapter changes {listed(more, 1)} too, which the trained adapter does not: they do not "
            "belong together; declare the folder that training began with"
        )
    if all(
        name in initial.tensors and torch.equal(initial.tensors[name], values)
        for name, values in trained.tensors.items()
    ):
        raise ConfigError("the initial adapter is the trained one itself, which would change nothing; declare another")
    return starts


def _from_residual(
    residual: AdapterFiles, expected: Sequence[Target], config: PeftLoraConfig, base: BaseModel
) -> dict[str, LowRank]:
    """What the residual model lacks of the base, as pairs of the adapter's rank."""
    starts: dict[str, LowRank] = {}
    for target in expected:
        weight_OI = base.weight(target.name)
        rest_OI = stored(residual, f"{target.name}.weight", (target.out_width, target.in_width))
        found = leading(weight_OI.double() - rest_OI.double(), config.rank(target.name))
        allowed = rounding(rest_OI, weight_OI) * base.weight_norm(target.name)
        if found.rest > allowed:
            raise ConfigError(
                f"the residual model differs from {base.name!r} on {target.name!r} by more than rank "
                f"{config.rank(target.name)}: {found.rest:.3g} is left, at most {allowed:.3g} is rounding; it is not "
                "what this adapter was trained on"
            )
        starts[target.name] = found.pair
    require_base_weights(residual, base, changed={f"{target.name}.weight" for target in expected})
    if not any(bool(start.a_RI.any()) for start in starts.values()):
        raise ConfigError(
            f"the residual model is {base.name!r} itself: nothing was taken out of it; declare the model that the "
            "adapter was trained on, or trained_on_base"
        )
    return starts
