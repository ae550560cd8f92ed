"""PiSSA: starts from the principal singular components of the base's weights.

    W = U Σ Vᵀ,  s·B0 A0 = U_r Σ_r V_rᵀ,  trained on W - s·B0 A0

The product is unique when σ_r > σ_{r+1}, so the start is recomputed from the base; that of the randomised
`pissa_niter_k` cannot be.

Source: https://arxiv.org/abs/2404.02948; layouts of PEFT (`init_lora_weights: pissa`) and of the authors (a residual
model with a folder `pissa_init`).
"""

from __future__ import annotations

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank
from motet.adapters.errors import UnsupportedError
from motet.adapters.methods.peft_config import PeftLoraConfig, init_stem
from motet.adapters.methods.residual import lower_residual
from motet.adapters.source import AdapterFiles

NAME = "pissa"

LEAST_GAP = 1e-6
"""(σ_r - σ_{r+1}) / σ_1 below which float32 does not determine the product."""


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration or the initial adapter's folder names PiSSA."""
    return init_stem(files.config) == NAME or files.initial_folder == "pissa_init"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a PiSSA folder.

    Raises:
        UnsupportedError: its start is random, or not unique, and not given.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    init = files.config.get("init_lora_weights")
    return lower_residual(
        files,
        base,
        NAME,
        stem=NAME,
        recompute=_principal if init == NAME else None,
        missing=f"init_lora_weights={init!r} starts PiSSA from a randomised SVD that cannot be repeated",
    )


def _principal(target: Target, config: PeftLoraConfig, base: BaseModel) -> LowRank:
    """U_r √Σ_r and √Σ_r V_rᵀ.

    Note: in float32 and by the function that training used, because the trained model holds the rounding errors of that
    start; from a float64 SVD it differs by up to 1.5e-5 ‖W‖ (SmolLM2-135M, rank 6).
    """
    rank = config.rank(target.name)
    u_OK, s_K, vt_KI = torch.linalg.svd(base.weight(target.name), full_matrices=False)
    if rank < len(s_K):
        gap = float((s_K[rank - 1] - s_K[rank]) / s_K[0])
        if gap < LEAST_GAP <= float(s_K[rank - 1] / s_K[0]):
            raise UnsupportedError(
                f"singular values {rank} and {rank + 1} of {target.name!r} differ by {gap:.1e} of the largest, less "
                f"than {LEAST_GAP:.0e}: which of them PiSSA took out cannot be told; declare the initial adapter"
            )
    root_R = s_K[:rank].sqrt()
    return LowRank(root_R[:, None] * vt_KI[:rank], u_OK[:, :rank] * root_R)
