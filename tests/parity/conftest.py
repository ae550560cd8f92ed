"""One served base per family with a wide choice of adapters, each beside PEFT's own model as the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.support.harness import Harness
from tests.support.models import ALL_LINEARS, FAMILIES, reference_copy, save_peft


def _config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEARS, **options})


ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "lora-all": lambda: _config(),
    "lora-qv-r3": lambda: _config(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "lora-r1": lambda: _config(r=1, lora_alpha=1, target_modules=["down_proj"]),
    "rslora": lambda: _config(r=4, lora_alpha=4, use_rslora=True),
    "patterns": lambda: _config(
        rank_pattern={"down_proj": 2, r"layers\.1\..*": 5},
        alpha_pattern={r"self_attn\.(q|k)_proj": 3, "v_proj": 24},
    ),
    "rslora-patterns": lambda: _config(
        use_rslora=True, rank_pattern={"q_proj": 12, "layers.0.mlp.up_proj": 1}, alpha_pattern={"up_proj": 2}
    ),
    "some-layers": lambda: _config(layers_to_transform=[0, 2], target_modules=["k_proj", "o_proj", "up_proj"]),
    "regex": lambda: _config(target_modules=r".*\.1\.mlp\.(gate|down)_proj"),
    "dora": lambda: _config(r=4, lora_alpha=8, use_dora=True),
    "dora-qv": lambda: _config(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "dora-rslora": lambda: _config(r=6, use_dora=True, use_rslora=True, target_modules=["k_proj", "down_proj"]),
    "bias-lora-only": lambda: _config(bias="lora_only"),
    "bias-all": lambda: _config(bias="all", target_modules=["v_proj", "o_proj"]),
    "lora-bias": lambda: _config(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]),
    "dora-bias": lambda: _config(use_dora=True, bias="lora_only", target_modules=["q_proj", "v_proj", "up_proj"]),
}
"""Every form that is served. `lora-bias` needs a base with biases and is left out elsewhere."""


def adapters_of(family: str) -> list[str]:
    return [name for name in ADAPTERS if family == "qwen2" or name != "lora-bias"]


@dataclass
class Served:
    """A family being served, and the untouched copy."""

    family: str
    harness: Harness
    reference: Any
    folders: dict[str, Path]
    _oracles: dict[str, Any] = field(default_factory=dict)

    def oracle(self, adapter: str | None) -> Any:
        """The model PEFT makes of the adapter, alone, or the base."""
        if adapter is None:
            return self.reference
        if adapter not in self._oracles:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(reference_copy(self.reference), self.folders[adapter])
            self._oracles[adapter] = model.eval()
        return self._oracles[adapter]

    @torch.no_grad()
    def expected_logits(self, prompt: list[int], adapter: str | None) -> torch.Tensor:
        """[V] after the prompt."""
        return self.oracle(adapter)(input_ids=torch.tensor([prompt])).logits[0, -1].float()


@pytest.fixture(scope="package", params=list(FAMILIES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = FAMILIES[request.param]()
    reference = reference_copy(model)
    root = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that `bias` makes its base differ when adapters are switched off
        folders = {
            name: save_peft(reference, root / name, ADAPTERS[name](), seed)
            for seed, name in enumerate(adapters_of(request.param))
        }
    harness = Harness(model)
    for name, folder in folders.items():
        harness.load(name, folder)
    yield Served(request.param, harness, reference, folders)
    assert harness.pool.spare == harness.pool.size
    assert all(info.leases == 0 for info in harness.registry.published())
