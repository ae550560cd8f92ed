"""CorDA: the initial pair is a part of the base, chosen by how much the target's inputs use it.

    C = mean of XᵀX over samples,  SVD(W C) = U Σ Vᵀ,  W = U Σ (Vᵀ C⁻¹);  B0 A0 = the first (IPM) or last (KPM) r terms

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2406.05223, as PEFT has it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from motet.adapters.recipes.folder import peft_config, peft_tensors, write
from motet.adapters.recipes.plain import lora_config, of_peft
from motet.adapters.recipes.trainee import Setup, Trainee

INITIAL = "corda_init"
"""Sub-folder of the initial pair, without which nobody can tell the change of the base from the trained one."""


def start(setup: Setup, mode: str) -> Trainee:
    """Calibrate one sample at a time, as PEFT's hooks want it, and take the pair out of the base.

    Args:
        mode: "ipm" or "kpm".
    """
    config = lora_config(setup, corda_config=CordaConfig(corda_method=mode))
    samples = setup.samples()

    @torch.no_grad()
    def look() -> None:
        for ids_1T in samples:  # in float32 throughout: autocast would round PEFT's products XᵀX too
            setup.model.model(ids_1T)

    preprocess_corda(setup.model, config, run_model=look)
    trainee = of_peft(setup, adapted := get_peft_model(setup.model, config))
    for module in setup.model.modules():
        if hasattr(module, "eigens"):
            del module.eigens
    initial = {name: tensor.detach().clone() for name, tensor in peft_tensors(adapted).items()}
    named = {**peft_config(config, setup.base_name), "init_lora_weights": True}

    def save(folder: Path) -> None:
        write(folder / INITIAL, initial, named, getattr(torch, setup.recipe.saved_dtype))
        trainee.save(folder)

    return Trainee(trainee.model, trainee.trainable, save)


ipm, kpm = partial(start, mode="ipm"), partial(start, mode="kpm")
