"""EVA: A starts as the right singular vectors of the target's inputs, ranks go where they explain most.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2410.07170, as PEFT has it.
"""

from __future__ import annotations

import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

from motet.adapters.recipes.plain import lora_config, of_peft
from motet.adapters.recipes.trainee import Setup, Trainee

RHO = 2.0
"""No target gets more than this times the mean rank; the sum of the ranks stays."""


def start(setup: Setup) -> Trainee:
    """Look at samples until the directions stand; targets that get rank 0 are left out."""
    adapted = get_peft_model(setup.model, lora_config(setup, eva_config=EvaConfig(rho=RHO)), low_cpu_mem_usage=True)
    # PEFT refuses a sample with fewer tokens than the highest rank there may be.
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in setup.samples()]
    initialize_lora_eva_weights(adapted, inputs, show_progress_bar=False)
    return of_peft(setup, adapted)
