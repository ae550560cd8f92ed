"""An adapter folder that the rig's base accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ALTERNATING = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
"""Orthogonal to the rig's weight of ones: a pair that repeats the base's weight looks trained on a residual model."""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.q_proj"
    tensors = {f"{place}.lora_A.weight": torch.ones(1, 4), f"{place}.lora_B.weight": ALTERNATING}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
