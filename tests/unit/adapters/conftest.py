"""One tiny base of each kind, and adapters that PEFT itself saved for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.methods import lower
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE, read
from tests.support.bases import base_of
from tests.support.models import reference_copy, save_peft, tiny_llama, tiny_qwen2


@dataclass(frozen=True)
class Bench:
    """A model, the base that adapters see of it, and PEFT beside."""

    model: Any
    base: BaseModel

    def save(self, folder: Path, seed: int = 1, **options: Any) -> Path:
        """An adapter as PEFT saves it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of `bias` and of deprecations in transformers
            return save_peft(self.model, folder, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}), seed)

    def lower(self, folder: Path) -> Lowered:
        return lower(read(folder), self.base)

    def peft(self, folder: Path) -> Any:
        """PEFT's own model of the adapter."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(reference_copy(self.model), str(folder)).eval()

    def merged(self, folder: Path) -> Any:
        """The plain model that PEFT merges the adapter into."""
        with torch.no_grad():
            return self.peft(folder).merge_and_unload()


Tensors = dict[str, torch.Tensor]


def edit(
    folder: Path, change: Callable[[Tensors], None] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Change the saved adapter in place: its tensors by `change`, its configuration by `config`."""
    if change is not None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return folder


@pytest.fixture(scope="session")
def llama() -> Bench:
    """No biases anywhere."""
    model = tiny_llama(num_hidden_layers=2)
    return Bench(model, base_of(model))


@pytest.fixture(scope="session")
def qwen2() -> Bench:
    """Biases on q, k and v."""
    model = tiny_qwen2()
    return Bench(model, base_of(model))
