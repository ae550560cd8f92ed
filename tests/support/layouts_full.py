"""Whole fine-tuned models: ordinary directories without a word of what was trained, as LISA leaves them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.layout import CHANGE, Layout
from tests.support.models import load_dense

Maker = Callable[[Any, Path, int], Layout]


def fine_tuned(*parts: str, dtype: torch.dtype = torch.float32) -> Maker:
    """Change every parameter whose path has one of the parts in it; what transformers reads back is the oracle."""

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        trained = copy.deepcopy(model)
        for path, parameter in trained.named_parameters():
            if any(part in path for part in parts):
                size = CHANGE * parameter.square().mean().sqrt().clamp(min=0.1)
                parameter += size * torch.randn(parameter.shape, generator=generator)
        trained.to(dtype).save_pretrained(folder)
        return Layout(folder, load_dense(folder, torch.float32), "full-model")

    return write
