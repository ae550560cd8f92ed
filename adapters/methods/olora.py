"""OLoRA: starts from the first r columns of Q and rows of R of the base's weights, W = Q R.

    trained on W - s·Q_r R_r

Q and R are unique up to signs, which cancel in the product, so the start is recomputed from the base.

Source: https://arxiv.org/abs/2406.01775; PEFT's `init_lora_weights: olora`.
"""

from __future__ import annotations

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank
from motet.adapters.methods.peft_config import PeftLoraConfig, init_stem
from motet.adapters.methods.residual import lower_residual
from motet.adapters.source import AdapterFiles

NAME = "olora"


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration or the initial adapter's folder names OLoRA."""
    return init_stem(files.config) == NAME or files.initial_folder == "olora_init"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower an OLoRA folder.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    recompute = _orthonormal if init_stem(files.config) == NAME else None
    return lower_residual(files, base, NAME, stem=NAME, recompute=recompute, missing="its configuration names no start")


def _orthonormal(target: Target, config: PeftLoraConfig, base: BaseModel) -> LowRank:
    """Q_r and R_r, in float32 as in training: the trained model holds the rounding errors of that start."""
    rank = config.rank(target.name)
    q_OM, r_MI = torch.linalg.qr(base.weight(target.name))
    return LowRank(r_MI[:rank], q_OM[:, :rank] * config.scale(target.name))
