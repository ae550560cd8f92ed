"""AMT: a pool of P members beside each other, of which a request's weights α make one adapter.

    trained model of α      W_res + Σ_p α_p s·B_p A_p,     W_res = W - s·B_0 A_0 the same for all members
    on the base itself      ΔW = Σ_p α_p s·(B_p A_p - B_0 A_0)     for Σ_p α_p = 1
    as one gated pair       A = [A_p; A_p - A_0]_p,  B = s·[B_p - B_0, B_0]_p,  g = α_p on both blocks of p

Without a start (members trained on the base itself) ΔW = Σ_p α_p s·B_p A_p, A = [A_p]_p, B = s·[B_p]_p.

A folder holds lora_A.{p}.weight [r, I] and lora_B.{p}.weight [O, r] of each target for p = 0 … P - 1, and the start as
lora_A.initial.weight and lora_B.initial.weight. `motet convert amt` writes it from the authors' checkpoints.

Must not know: how α is found (gates.merge), requests.

Source: https://openreview.net/forum?id=HxGdbAmYYr and the layout of its code, which stores W_res in the model, starts
from the principal part of W (so W_res = W - P W with P onto the columns of B_0) and has s = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import GateSpec, Lowered, LowRank, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, UnsupportedError, listed
from motet.adapters.methods.centred import centred
from motet.adapters.methods.config_values import boolean, number, positive_int
from motet.adapters.methods.lora import RESIDUAL_SHARE, projected_share
from motet.adapters.methods.residual import LEAST_COSINE
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

NAME = "amt"
PEFT_TYPE = "AMT"
START = "initial"
INERT = ("base_model_name_or_path", "task_type")
KEYS = frozenset(
    ("bias_cls", "inference_mode", "lora_alpha", "members", "peft_type", "r", "scale_cls", "strengths", *INERT)
)

FARTHEST_START = 0.05
"""‖s·B_0 A_0 - P W‖/‖P W‖ over all targets, above which a start was not taken out of this base: 0.002 where factors and
base are bfloat16, at least 1 with another base or twice the scale."""


@dataclass(frozen=True, slots=True)
class AmtConfig:
    """A checked configuration of a pool.

    Attributes:
        members: P.
        scale_cls, bias_cls: of the cosine classifier that the members were trained with; None where it is not said.
        strengths: of the attacks that the members were trained with, for people; None where it is not said.
    """

    r: int
    lora_alpha: float
    members: int
    scale_cls: float | None
    bias_cls: float | None
    strengths: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The saved pairs of one target, scales folded into B.

    Attributes:
        members: P pairs of rank r.
        start: what the members were trained from; None where that is nothing.
    """

    members: Sequence[LowRank]
    start: LowRank | None


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration names a pool."""
    return files.config.get("peft_type") == PEFT_TYPE


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a pool: one gated pair a target.

    Raises:
        FormatError: the folder does not describe a pool for this base exactly.
    """
    config = parse(files.config)
    if files.initial is not None or files.residual is not None:
        raise ConfigError(
            "a pool holds its own start (lora_A.initial, lora_B.initial): a declared initial adapter or residual model "
            "means nothing to it; drop it"
        )
    pools = _read(files, base, config)
    started = any(pool.start is not None for pool in pools.values())
    if started and files.trained_on_base:
        raise ConfigError("trained_on_base contradicts the pool's own start; drop the declaration")
    if started:
        _require_start(pools, base)
    elif not files.trained_on_base:
        _require_plain(pools, config.members, base)
    block = config.r * (2 if started else 1)
    groups_R = torch.arange(config.members).repeat_interleave(block)
    return Lowered(
        method=NAME,
        form=f"pool of {config.members} members" + (", centred on their start" if started else ""),
        scaling="alpha/r",
        effects={name: TargetEffects(_stacked(pool)) for name, pool in pools.items()},
        expected_targets=len(pools),
        gate=GateSpec(
            kind="pool",
            size=config.members,
            groups=dict.fromkeys(pools, groups_R),
            tensors={},
            facts={
                "members": config.members,
                "strengths": None if config.strengths is None else list(config.strengths),
                "scale_cls": config.scale_cls,
                "bias_cls": config.bias_cls,
                "needs_sum_one": started,
            },
        ),
    )


def parse(config: Mapping[str, Any]) -> AmtConfig:
    """Check every key of a pool's adapter_config.json.

    Raises:
        ConfigError: a key is unknown, missing or impossible.
    """
    for key in sorted(config.keys() - KEYS):
        raise ConfigError(
            f"adapter_config.json of a pool has the unknown key {key!r} ({config[key]!r}); skipping it could change "
            "the answers, so the adapter is refused: remove the key if it has no effect"
        )
    for key in INERT:
        if not isinstance(config.get(key), str | None):
            raise ConfigError(f"{key}={config[key]!r} is not a name")
    boolean(config, "inference_mode")
    members = positive_int("members", config.get("members"))
    scale_cls, bias_cls, strengths = (config.get(key) for key in ("scale_cls", "bias_cls", "strengths"))
    if strengths is not None and not (isinstance(strengths, list) and len(strengths) == members):
        raise ConfigError(f"strengths={strengths!r} is not a list of {members} numbers, one a member")
    if scale_cls is not None and number("scale_cls", scale_cls) <= 0:
        raise ConfigError(f"scale_cls={scale_cls!r} must be above 0: a larger similarity is a likelier class")
    return AmtConfig(
        r=positive_int("r", config.get("r")),
        lora_alpha=number("lora_alpha", config.get("lora_alpha")),
        members=members,
        scale_cls=None if scale_cls is None else float(scale_cls),
        bias_cls=None if bias_cls is None else number("bias_cls", bias_cls),
        strengths=None if strengths is None else tuple(number("strengths", value) for value in strengths),
    )


def _read(files: AdapterFiles, base: BaseModel, config: AmtConfig) -> dict[str, Pool]:
    """Every pair of every target that has one, and nothing else."""
    if 2 * config.members > len(files.tensors):
        raise MissingTensorError(
            f"members={config.members}, but the folder has {len(files.tensors)} tensors: 2 a member and target are "
            "needed; correct the configuration or save the pool again"
        )
    bag = TensorBag(files.tensors)
    starts = bag.modules_with(f".lora_A.{START}.weight", f".lora_B.{START}.weight")
    labels = [str(member) for member in range(config.members)]
    found = bag.modules_with(*(f".lora_{letter}.{label}.weight" for label in labels for letter in "AB")) | starts
    if starts and (without := found - starts):
        raise MissingTensorError(
            f"the pool has a start, but not for {listed(without)}; either every target has one or none: save it again"
        )
    pools = {
        target.name: Pool(
            [_pair(target, label, config, bag) for label in labels],
            _pair(target, START, config, bag) if starts else None,
        )
        for target in base.targets.values()
        if target.kind is Kind.LINEAR and target.name in found
    }
    bag.require_empty()
    if not pools:
        raise MissingTensorError(f"the pool has no tensors for any linear layer of {base.name!r}; save it again")
    return pools


def _pair(target: Target, label: str, config: AmtConfig, bag: TensorBag) -> LowRank:
    a_RI = bag.take(f"{PREFIX}{target.name}.lora_A.{label}.weight", (config.r, target.in_width))
    b_OR = bag.take(f"{PREFIX}{target.name}.lora_B.{label}.weight", (target.out_width, config.r))
    return LowRank(a_RI, b_OR * (config.lora_alpha / config.r))


def _stacked(pool: Pool) -> LowRank:
    pairs = pool.members if pool.start is None else [centred(member, pool.start) for member in pool.members]
    return LowRank(
        torch.cat([pair.a_RI for pair in pairs]).contiguous(), torch.cat([pair.b_OR for pair in pairs], 1).contiguous()
    )


def _require_start(pools: Mapping[str, Pool], base: BaseModel) -> None:
    """Require that the start was taken out of this base, and that every member was trained from it."""
    starts = {name: pool.start for name, pool in pools.items() if pool.start is not None}
    apart, whole = 0.0, 0.0
    for name, start in starts.items():
        left_OR, values_R, _ = torch.linalg.svd(start.b_OR.double(), full_matrices=False)
        basis_OR = left_OR[:, values_R > 1e-6 * values_R.max()]
        taken_RI = basis_OR.T @ base.weight(name).double()
        apart += float((basis_OR.T @ start.b_OR.double() @ start.a_RI.double() - taken_RI).square().sum())
        whole += float(taken_RI.square().sum())
    distance = (apart / whole) ** 0.5 if whole > 0 else float("inf")
    if not distance <= FARTHEST_START:
        raise ConfigError(
            f"the pool's start is not a part of {base.name!r}: it differs from the base's own part by {distance:.2g} "
            f"of its size, more than {FARTHEST_START}; the pool belongs to another base, or lora_alpha is wrong"
        )
    for place in range(len(next(iter(pools.values())).members)):
        pairs = [(pool.members[place].a_RI.double(), starts[name].a_RI.double()) for name, pool in pools.items()]
        sizes = [sum(float(pair[i].square().sum()) for pair in pairs) for i in (0, 1)]
        shared = sum(float((member_RI * start_RI).sum()) for member_RI, start_RI in pairs)
        cosine = shared / (sizes[0] * sizes[1]) ** 0.5 if sizes[0] * sizes[1] > 0 else 0.0
        if not cosine >= LEAST_COSINE:
            raise ConfigError(
                f"A of member {place} and A of the start have cosine {cosine:.2f}, below {LEAST_COSINE}: its training "
                "did not begin with this start; save the pool with the start that it was trained from"
            )


def _require_plain(pools: Mapping[str, Pool], members: int, base: BaseModel) -> None:
    """Refuse members that look trained on a residual model, whose start is not there."""
    for place in range(members):
        effects = {name: TargetEffects(pool.members[place]) for name, pool in pools.items()}
        if (share := projected_share(effects, base)) > RESIDUAL_SHARE:
            raise UnsupportedError(
                f"member {place} looks trained on a residual model, not on {base.name!r}: B A is a projection of the "
                f"base's weights (share {share:.2f}; above {RESIDUAL_SHARE} is refused); save the pool with its start "
                f"(lora_A.{START}, lora_B.{START}), or declare trained_on_base if it was not trained so"
            )
