"""LoRA-GA: starts from singular vectors of the loss's gradient, and takes that start out of the base.

Source: https://arxiv.org/abs/2407.05000; PEFT's `init_lora_weights: lora_ga`. The gradients are not in the folder, so
the start must be given.
"""

from __future__ import annotations

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.methods.peft_config import init_stem
from motet.adapters.methods.residual import lower_residual
from motet.adapters.source import AdapterFiles

NAME = "lora_ga"


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration or the initial adapter's folder names LoRA-GA."""
    named = init_stem(files.config) == NAME or bool(files.config.get("lora_ga_config"))
    return named or files.initial_folder == "lora_ga_init"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a LoRA-GA folder.

    Raises:
        UnsupportedError: its start is not given.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    missing = "LoRA-GA starts from gradients that are not in the folder"
    return lower_residual(files, base, NAME, stem=NAME, recompute=None, missing=missing)
