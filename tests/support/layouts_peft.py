"""Folders of PEFT of which the pair is the whole change: LoRA and its variants, EVA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

from tests.support.layout import Layout, family_name, look_trained, lora_layers, products, read_back
from tests.support.models import ALL_LINEARS, VOCABULARY, save_peft


def lora(**options: Any) -> Callable[[Any, Path, int], Layout]:
    """PEFT's own forms, with random weights of no small change."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEARS, **options})
        save_peft(model, folder, config, seed)
        oracle = read_back(model, folder)
        return Layout(folder, oracle, family_name(config), deltas_OI=products(oracle))

    return write


def saved_layers(tokens: int, **options: Any) -> Callable[[Any, Path, int], Layout]:
    """LoRA on a base whose embedding and head were trained before: PEFT saves the layers whole beside the pairs.

    Args:
        tokens: how many rows differ from the base's.
    """

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        trained = copy.deepcopy(model)
        for parameter in {id(p): p for p in (trained.get_input_embeddings().weight, trained.lm_head.weight)}.values():
            rows = torch.randperm(len(parameter), generator=generator)[:tokens]
            parameter[rows] += 0.3 * parameter.std() * torch.randn(parameter[rows].shape, generator=generator)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
        save_peft(trained, folder, config, seed, save_embedding_layers=True)
        oracle = read_back(trained, folder)
        return Layout(folder, oracle, family_name(config), deltas_OI=products(oracle))

    return write


def eva() -> Callable[[Any, Path, int], Layout]:
    """Ranks as PEFT redistributes them by explained variance, some of them zero."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        settings = EvaConfig(rho=2.0, use_label_mask=False)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS, init_lora_weights="eva", eva_config=settings)
        peft_model = get_peft_model(copy.deepcopy(model), config)
        initialize_lora_eva_weights(peft_model, calibration(seed), show_progress_bar=False)
        assert len({layer.r["default"] for _, layer in lora_layers(peft_model)}) > 1
        generator = torch.Generator().manual_seed(seed)
        for _, layer in lora_layers(peft_model):  # B begins at zero
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02, generator=generator)
        look_trained(peft_model, model, seed)
        peft_model.save_pretrained(folder)
        return Layout(folder, read_back(model, folder), "lora", deltas_OI=products(peft_model))

    return write


def calibration(seed: int, batches: int = 12, batch: int = 4, tokens: int = 24) -> list[dict[str, torch.Tensor]]:
    """Batches of random text, [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCABULARY, (batch, tokens), generator=generator) for _ in range(batches)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in made]
