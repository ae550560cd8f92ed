"""CorDA in its authors' layout: a model directory whose linears are split in three.

    y = ALinear(BLinear x) + weight_residual x,   hence   ΔW = ALinear·BLinear + weight_residual - W

ALinear is what PEFT calls B, BLinear what it calls A; there is no scale. The change has at most twice the stored rank,
the rest is rounding of weight_residual. The directory's own modelling code is not needed and never run.

Source: https://arxiv.org/abs/2406.05223 and the files its authors' code writes.
"""

from __future__ import annotations

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import Lowered, LowRank, OutputBias, TargetEffects
from motet.adapters.errors import ConfigError, UnmatchedTensorError, listed
from motet.adapters.methods.base_weights import require_base_weights, rounding, stored
from motet.adapters.methods.config_values import positive_int
from motet.adapters.methods.model_config import require_same_computation
from motet.adapters.methods.principal import leading
from motet.adapters.source import AdapterFiles, Layout

NAME = "corda-model"
A_KEY, B_KEY, RESIDUAL_KEY, BIAS_KEY = ".BLinear.weight", ".ALinear.weight", ".weight_residual", ".ALinear.bias"


def claims(files: AdapterFiles) -> bool:
    """Whether it is a model directory with split linears."""
    return files.layout is Layout.MODEL and any(name.endswith(RESIDUAL_KEY) for name in files.tensors)


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower the directory's difference from the base.

    Raises:
        FormatError: the directory is not this base with changes of the stored rank.
    """
    files.require_no_start(NAME)
    require_same_computation(files, base, own=("auto_map", "lora_r"))
    rank = positive_int("lora_r", files.config.get("lora_r"))
    keys = (A_KEY, B_KEY, RESIDUAL_KEY)
    split = sorted({name.removesuffix(key) for name in files.tensors for key in keys if name.endswith(key)})
    linears = {name for name, target in base.targets.items() if target.kind is Kind.LINEAR}
    if unknown := [name for name in split if name not in linears]:
        raise UnmatchedTensorError(f"{listed(unknown, 1)} is not among the linear layers of {base.name!r}")
    effects = {name: _lower_target(base.targets[name], rank, files, base) for name in split}
    parts = {name + key for name in split for key in (A_KEY, B_KEY, RESIDUAL_KEY, BIAS_KEY)}
    own = {f"{name}.{part}" for name in split for part in ("weight", "bias")}
    require_base_weights(files, base, changed=parts, replaced=own)
    return Lowered(
        method="corda",
        form="CorDA model directory",
        scaling="none",
        effects=effects,
        expected_targets=len(split),
    )


def _lower_target(target: Target, rank: int, files: AdapterFiles, base: BaseModel) -> TargetEffects:
    a_RI = stored(files, target.name + A_KEY, (rank, target.in_width))
    b_OR = stored(files, target.name + B_KEY, (target.out_width, rank))
    residual_OI = stored(files, target.name + RESIDUAL_KEY, (target.out_width, target.in_width))
    weight_OI = base.weight(target.name)
    most = min(2 * rank, *weight_OI.shape)
    change = leading(b_OR.double() @ a_RI.double() + (residual_OI.double() - weight_OI.double()), most)
    allowed = rounding(residual_OI, weight_OI) * base.weight_norm(target.name)
    if change.rest > allowed:
        raise ConfigError(
            f"{target.name!r} differs from {base.name!r} by more than rank {2 * rank}: {change.rest:.3g} is left, at "
            f"most {allowed:.3g} is rounding; the directory belongs to another base model"
        )
    pair = LowRank(change.pair.a_RI.float().contiguous(), change.pair.b_OR.float().contiguous())
    return TargetEffects(pair, bias=_bias(target, files, base))


def _bias(target: Target, files: AdapterFiles, base: BaseModel) -> OutputBias | None:
    if (target.name + BIAS_KEY in files.tensors) != target.has_bias:
        raise ConfigError(f"{target.name!r} has a bias in only one of {base.name!r} and the directory: another model")
    if not target.has_bias:
        return None
    return OutputBias(stored(files, target.name + BIAS_KEY, (target.out_width,)).float() - base.bias(target.name))
