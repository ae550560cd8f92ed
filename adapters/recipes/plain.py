"""Methods that PEFT starts from its configuration alone: LoRA, rsLoRA, DoRA, PiSSA, OLoRA.

Must not know: the other starts, data, loops.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from motet.adapters.recipes.folder import peft_config, peft_tensors, write
from motet.adapters.recipes.trainee import Setup, Trainee


def lora_config(setup: Setup, **further: Any) -> LoraConfig:
    """PEFT's configuration of the setup."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=setup.rank,
        lora_alpha=setup.alpha,
        target_modules=list(setup.targets),
        **{"lora_dropout": 0.0, **setup.recipe.peft, **further},
    )


def start(setup: Setup) -> Trainee:
    """PiSSA and OLoRA take the initial pair out of the base: s·(B A - B0 A0) is the change."""
    return of_peft(setup, get_peft_model(setup.model, lora_config(setup)))


def of_peft(setup: Setup, adapted: Any) -> Trainee:
    """A model that PEFT has put its adapter into."""

    def save(folder: Any) -> None:
        dtype = getattr(torch, setup.recipe.saved_dtype)
        write(folder, peft_tensors(adapted), peft_config(adapted.peft_config["default"], setup.base_name), dtype)

    by_address = {tensor.data_ptr(): name for name, tensor in peft_tensors(adapted).items()}
    trainable = {by_address[p.data_ptr()]: p for p in adapted.parameters() if p.requires_grad}
    return Trainee(adapted.get_base_model(), trainable, save)
