"""Converts checkpoints of AMT's authors, pickles of a whole DINO vision transformer, to a folder with one pool.

Must not know: the registry, servers, how a pool is lowered. Runs offline. The authors keep q, k and v in one linear
whose pair is three independent ones, and W_res in place of W; what was taken out follows without an SVD's ambiguities:

    qkv: A_j = lora_A[r·j : r·(j+1)], B_j = lora_B[O·j : O·(j+1)]      s·B_0 A_0 = W - W_res, exactly of rank r

The scale is always 1: the authors' start asserts it. Probabilities of the pool's classifier are scaled by the mean of
what its members learnt; the authors' packing of a pool is not published.

Source: the layout of the authors' code, https://openreview.net/forum?id=HxGdbAmYYr.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from motet.adapters.bounded import DEFAULT_LIMITS, parse_tensors, read_file
from motet.adapters.checkpoint import read_checkpoint
from motet.adapters.convert.amt_checkpoint import LINEARS, Member, members_in
from motet.adapters.convert.folder import new_folder, require_new
from motet.adapters.convert.plain_pickle import read_plain_pickle
from motet.adapters.convert.timm_vit import under_timm_names
from motet.adapters.effects import LowRank
from motet.adapters.errors import ConfigError
from motet.adapters.methods.amt import PEFT_TYPE, START
from motet.adapters.methods.base_weights import rounding
from motet.adapters.methods.centred import aligned
from motet.adapters.methods.principal import leading
from motet.adapters.methods.tensors import PREFIX
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE

SAME_RESIDUAL = 2.0**-14
"""Of ‖W‖: a float32 SVD on another machine moves W_res by up to 1.5e-5 ‖W‖ (ADR 7); another rank by far more."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, for people.

    Attributes:
        scales_cls: of every member; the mean was written.
    """

    members: int
    rank: int
    started: bool
    scales_cls: tuple[float, ...]


def convert(checkpoint_files: Sequence[Path], base: Path, out_folder: Path, *, prefix: str | None = None) -> Converted:
    """Write the pool for transformers' ViT modules.

    Args:
        checkpoint_files: one a member, in order, or a single one of the whole pool; only tensors and plain values are
            read from them.
        base: the ViT that training began with: a model directory as transformers saves it, or a file of DINO's or
            timm's names (safetensors, or a pickle of tensors).
        out_folder: is made.
        prefix: before "layers" in the served model's module paths; by default as in the directory, "" for a file,
            which is a ViTModel without a head.

    Raises:
        AdapterExistsError: `out_folder` is there already.
        SourceError: a file cannot be read safely.
        FormatError: the checkpoints are not AMT's, are incomplete, or were trained on another base.
    """
    require_new(out_folder)
    weights, own_prefix = _base(base)
    members = [member for file in checkpoint_files for member in members_in(file, weights, len(checkpoint_files) == 1)]
    rank = _common_rank(members)
    tensors, started = _pool(members, weights, rank, own_prefix if prefix is None else prefix, base.name)
    strengths = [member.strength for member in members]
    config: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base.name,
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "members": len(members),
        "scale_cls": sum(member.scale_cls for member in members) / len(members),
        "bias_cls": sum(member.bias_cls for member in members) / len(members),
        **({} if None in strengths else {"strengths": strengths}),
    }
    _write(out_folder, tensors, config)
    return Converted(len(members), rank, started, tuple(member.scale_cls for member in members))


def _base(base: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Name in timm → tensor, without a head; and what stands before "layers" in transformers."""
    if base.is_dir():
        config, tensors, _ = read_checkpoint(base, DEFAULT_LIMITS)
        return under_timm_names(config, tensors), "vit." if any(name.startswith("vit.") for name in tensors) else ""
    if base.suffix == ".safetensors":
        content = read_file(base.parent, base.name, DEFAULT_LIMITS.weights_bytes)
        found: Mapping[str, Any] = parse_tensors(base.name, content, DEFAULT_LIMITS)
    else:
        found = read_plain_pickle(base)
    if not found or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ConfigError(f"{base.name} holds more than tensors; give the backbone alone, as DINO or timm publish it")
    if "blocks.0.attn.qkv.weight" not in found:
        raise ConfigError(
            f"{base.name} has no tensor 'blocks.0.attn.qkv.weight': it is no ViT by DINO's or timm's names; give one, "
            "or a folder as transformers saves it"
        )
    return {name: tensor.float() for name, tensor in found.items() if not name.startswith("head.")}, ""


def _common_rank(members: Sequence[Member]) -> int:
    ranks = [next(iter(member.pairs.values())).b_OR.shape[1] for member in members]
    if not ranks:
        raise ConfigError("there are no checkpoints; give at least 1")
    for member, rank in zip(members, ranks, strict=True):
        if rank != ranks[0]:
            raise ConfigError(f"{member.name} has rank {rank}, {members[0].name} {ranks[0]}: they are not of one pool")
    return ranks[0]


def _pool(
    members: Sequence[Member], base: Mapping[str, torch.Tensor], rank: int, prefix: str, base_name: str
) -> tuple[dict[str, torch.Tensor], bool]:
    """Name in the folder → tensor; and whether there is a start.

    Raises:
        ConfigError: what was taken out of the base is not of the pairs' rank, or not the same for all members.
    """
    tensors: dict[str, torch.Tensor] = {}
    begun: dict[str, bool] = {}
    for linear, residual_OI in members[0].residuals.items():
        weight_OI = base[f"{linear}.weight"]
        for member in members[1:]:
            apart = float(torch.linalg.vector_norm(member.residuals[linear].double() - residual_OI.double()))
            if apart > (allowed := SAME_RESIDUAL * float(torch.linalg.vector_norm(weight_OI))):
                raise ConfigError(
                    f"{member.name} and {members[0].name} have weights of {linear!r} that differ by {apart:.3g}, more "
                    f"than {allowed:.3g}: their members did not begin alike and are not of one pool"
                )
        _, layer, kind = linear.split(".", 2)
        parts = LINEARS[kind]
        fused = [
            zip(member.pairs[linear].a_RI.chunk(len(parts)), member.pairs[linear].b_OR.chunk(len(parts)), strict=True)
            for member in members
        ]
        rows = zip(
            parts, weight_OI.chunk(len(parts)), residual_OI.chunk(len(parts)), zip(*fused, strict=True), strict=True
        )
        for part, w_OI, rest_OI, pairs in rows:
            target = f"{prefix}layers.{layer}.{part}"
            named = {str(place): LowRank(*pair) for place, pair in enumerate(pairs)}
            start = _start(target, w_OI, rest_OI, list(named.values()), rank, base_name)
            begun[target] = start is not None
            for label, pair in {**named, **({} if start is None else {START: start})}.items():
                tensors[f"{PREFIX}{target}.lora_A.{label}.weight"] = _own(pair.a_RI)
                tensors[f"{PREFIX}{target}.lora_B.{label}.weight"] = _own(pair.b_OR)
    if len(set(begun.values())) > 1:
        untouched = next(target for target, has_start in begun.items() if not has_start)
        raise ConfigError(
            f"the checkpoint took a part out of other linears of {base_name!r}, but not out of {untouched!r}: it was "
            "trained on another model, or only in part; give the ViT that training began with"
        )
    return tensors, all(begun.values())


def _start(
    target: str, weight_OI: torch.Tensor, rest_OI: torch.Tensor, members: Sequence[LowRank], rank: int, base_name: str
) -> LowRank | None:
    """What the checkpoint lacks of the base, in the members' coordinates; None where that is rounding."""
    taken_OI = weight_OI.double() - rest_OI.double()
    allowed = rounding(rest_OI, weight_OI) * float(torch.linalg.vector_norm(weight_OI))
    if float(torch.linalg.vector_norm(taken_OI)) <= allowed:
        return None
    found = leading(taken_OI, rank)
    if found.rest > allowed:
        raise ConfigError(
            f"the checkpoint's weight of {target!r} differs from {base_name!r} by more than rank {rank}: "
            f"{found.rest:.3g} is left, at most {allowed:.3g} is rounding; it was trained on another model"
        )
    middle = LowRank(
        torch.stack([member.a_RI for member in members]).mean(0),
        torch.stack([member.b_OR for member in members]).mean(0),
    )
    return aligned(found.pair, middle)


def _own(values: torch.Tensor) -> torch.Tensor:
    return values.float().clone(memory_format=torch.contiguous_format)


def _write(out_folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    with new_folder(out_folder) as made:
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
