"""LoRA, rank-stabilised LoRA and DoRA in PEFT's layout, trained on the base model itself.

    ΔW = s·B A,  s = alpha/r  (rsLoRA: alpha/√r),  r and alpha per module by pattern
    DoRA:  y = k ⊙ (W x + s·B A x) + c,  k_i = m_i / ‖(W + s·B A)_i‖₂   (the bias of the base is not scaled)

Also what other methods are converted to (EVA, PEFT's conversion of PiSSA and CorDA).

Source: https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732, https://arxiv.org/abs/2402.09353 and the
files peft 0.21 writes. PEFT computes DoRA's norm on each forward in the base's dtype; here it is computed once, in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered, TargetEffects
from motet.adapters.errors import UnsupportedError
from motet.adapters.methods.centred import recentred
from motet.adapters.methods.peft_config import PeftLoraConfig, parse
from motet.adapters.methods.peft_lora import lower_folder, trained_pair
from motet.adapters.source import AdapterFiles

NAME = "lora"

RESIDUAL_SHARE = 0.2
"""Projected share from which an adapter counts as trained on a residual model: 1 at its start (ADR 7)."""


def claims(files: AdapterFiles) -> bool:
    """Whether this method reads the folder: it is the last in the table and takes what names LORA."""
    return files.config.get("peft_type") == "LORA"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Turn the folder into effects on the targets of `base`.

    Raises:
        UnsupportedError: the adapter looks trained on a residual model, and was not declared to be otherwise.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    config = parse(files.config)
    lowered = lower_folder(
        files,
        base,
        config,
        lambda target, bag: recentred(trained_pair(target, config, bag)),
        method=_name(config),
        form="PEFT folder",
    )
    share = projected_share(lowered.effects, base)
    if share > RESIDUAL_SHARE and not files.trained_on_base:
        raise UnsupportedError(
            f"the adapter looks trained on a residual model (PiSSA, CorDA, OLoRA), not on {base.name!r}: B A is a "
            f"projection of the base's weights (share {share:.2f}; above {RESIDUAL_SHARE} is refused), so adding it "
            "would count that part twice; declare the adapter before training (initial) or the residual model "
            "(residual), or declare trained_on_base if it was not trained so"
        )
    return lowered


def _name(config: PeftLoraConfig) -> str:
    if config.use_rslora:
        return "rslora+dora" if config.use_dora else "rslora"
    return "dora" if config.use_dora else NAME


def projected_share(effects: Mapping[str, TargetEffects], base: BaseModel) -> float:
    """Cosine between B A and P W, over all targets, with P the projector on the columns of B.

    What PiSSA, OLoRA and CorDA take out of the base and give the adapter to start from is such a projection, times a
    factor: its cosine is 1. A change learnt from zero has nothing to do with the weights: near 0.
    """
    shared, ours, theirs = 0.0, 0.0, 0.0
    for name, effect in effects.items():
        if effect.low_rank is not None:
            a_RI, b_OR, weight_OI = effect.low_rank.a_RI, effect.low_rank.b_OR, base.weight(name)
            basis_OR, _ = torch.linalg.qr(b_OR)
            shared += float(((b_OR.T @ weight_OI) * a_RI).sum())
            ours += float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())
            theirs += float((basis_OR.T @ weight_OI).square().sum())
    return shared / (ours * theirs) ** 0.5 if ours * theirs > 0 else 0.0
