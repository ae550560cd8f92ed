"""CorDA in PEFT's layout: starts from components of the base's weights that its activations on sample text single out.

    W C = U Σ Vᵀ,  s·B0 A0 = U_r Σ_r V_rᵀ C⁻¹,  trained on W - s·B0 A0

with C the covariance of the inputs; the largest r components (instruction-previewed mode) or the smallest
(knowledge-preserved mode). The sample text is not in the folder, so the start must be given.

Source: https://arxiv.org/abs/2406.05223; PEFT's `init_lora_weights: corda` and its `preprocess_corda`, which writes a
residual model with a folder `corda_init`.
"""

from __future__ import annotations

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.methods.peft_config import init_stem
from motet.adapters.methods.residual import lower_residual
from motet.adapters.source import AdapterFiles

NAME = "corda"


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration or the initial adapter's folder names CorDA."""
    named = init_stem(files.config) == NAME or bool(files.config.get("corda_config"))
    return named or files.initial_folder == "corda_init"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a CorDA folder.

    Raises:
        UnsupportedError: its start is not given.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    missing = (
        "CorDA starts from sample text that is not in the folder: the initial adapter (corda_init), the residual model "
        "and the SVD cache (motet convert) are missing"
    )
    return lower_residual(files, base, NAME, stem=NAME, recompute=None, missing=missing)
