"""One tiny base of each kind, and adapters that PEFT itself saved for them."""

from __future__ import annotations

import json
import os
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
from motet.adapters.spec import NOTHING_DECLARED, Declared
from tests.support.bases import base_of
from tests.support.layout import Layout
from tests.support.layouts import make
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

    def layout(self, name: str, folder: Path, seed: int = 1) -> Layout:
        """One of the layouts that are served, written for this model."""
        return make(name, self.model, folder, seed)

    def lower(self, folder: Path, declared: Declared = NOTHING_DECLARED) -> Lowered:
        return lower(read(folder, declared), self.base)

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
        edit_tensors(folder / WEIGHTS_FILE, change)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return folder


def edit_tensors(file: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def product(lowered: Lowered, target: str) -> torch.Tensor:
    """B A [O, I] float64 of a target."""
    low_rank = lowered.effects[target].low_rank
    assert low_rank is not None
    return low_rank.b_OR.double() @ low_rank.a_RI.double()


@pytest.fixture(scope="session")
def llama() -> Bench:
    """No biases anywhere."""
    model = tiny_llama(num_hidden_layers=2)
    return Bench(model, base_of(model))


@pytest.fixture(scope="session")
def lastfm() -> Path:
    """The folder of the official SASRec and its users, beside the repository."""
    folder = Path(os.environ.get("MOTET_DATA", Path(__file__).parents[4] / "shared" / "data")) / "rec" / "lastfm"
    if not (folder / "sasrec_lastfm.safetensors").is_file():
        pytest.skip("the official SASRec is not here: set MOTET_DATA to a folder with rec/lastfm")
    return folder


@pytest.fixture(scope="session")
def qwen2() -> Bench:
    """Biases on q, k and v."""
    model = tiny_qwen2()
    return Bench(model, base_of(model))
