"""Adapters that add tokens to the base's vocabulary, as PEFT and transformers save them after a resize.

Must not know: how Motet reads them. The oracle is the resized model itself, cut to the tokens its tokenizer knows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from tests.support.layout import Layout, family_name, read_back
from tests.support.models import VOCABULARY, load_dense, save_peft
from tests.support.tokenizer import word_tokenizer

ADDED = ("<a>", "<b>", "<c>")
WIDER = VOCABULARY + len(ADDED)
QV = ["q_proj", "v_proj"]

Maker = Callable[[Any, Path, int], Layout]


def resized(model: Any, seed: int, rows: int = WIDER) -> Any:
    """A copy with more tokens, whose rows are of the size of the others, so that they stand among the top logits."""
    wider = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wider.resize_token_embeddings(rows, mean_resizing=False)
        generator = torch.Generator().manual_seed(seed)
        for end in {id(p): p for p in (wider.get_input_embeddings().weight, wider.lm_head.weight)}.values():
            added = end[VOCABULARY:]
            added.copy_(2 * end[3:VOCABULARY].std() * torch.randn(added.shape, generator=generator))
    return wider


def peft(*, save_layers: bool = True, trained: tuple[int, ...] = (), **options: Any) -> Maker:
    """A PEFT folder.

    Args:
        save_layers: whether the resized layers are saved whole.
        trained: rows whose training is saved as such.
    """

    def write(model: Any, folder: Path, seed: int) -> Layout:
        wider = resized(model, seed)
        tokens = {"trainable_token_indices": list(trained)} if trained else {}
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV, **tokens, **options})
        save_peft(wider, folder, config, seed, save_embedding_layers=save_layers)
        word_tokenizer(VOCABULARY, ADDED).save_pretrained(folder)
        return Layout(folder, read_back(wider, folder), family_name(config))

    return write


def fine_tuned(part: str = "none at all", rows: int = WIDER) -> Maker:
    """A model directory.

    Args:
        part: parameters with this in their path are trained too.
        rows: of the resized layers; those that no tokenizer knows are padding.
    """

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        wider = resized(model, seed, rows)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in wider.named_parameters():
            if part in path:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        wider.save_pretrained(folder)
        word_tokenizer(VOCABULARY, ADDED).save_pretrained(folder)
        oracle = load_dense(folder, torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle.resize_token_embeddings(WIDER)
        return Layout(folder, oracle, "full-model")

    return write


ADDED_LAYOUTS: Mapping[str, Maker] = {
    "saved-layers": peft(),
    "saved-modules": peft(save_layers=False, modules_to_save=["embed_tokens", "lm_head"]),
    "trained-tokens": peft(trained=(5, 256, 258, 257)),
    "trained-tokens-alone": peft(save_layers=False, trained=(256, 257, 7, 258)),
    "lora-ends": peft(target_modules=["embed_tokens", "lm_head", "k_proj"], use_rslora=True),
    "dora-ends": peft(target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "lora-embedding": peft(target_modules=["embed_tokens"]),
    "model": fine_tuned(),
    "model-padded": fine_tuned("up_proj", rows=VOCABULARY + 24),
    "model-dense": fine_tuned("embed_tokens"),
}

NEEDS_TIES = ("trained-tokens-alone", "lora-embedding")
"""Without tied weights PEFT leaves the rows of the head out of such a folder."""
