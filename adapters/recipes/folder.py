"""Writes adapter folders as PEFT does: two files, and no trace of where the base model lay.

Must not know: methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save

from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE


def peft_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter of a PEFT model, by the names of its file; not copied."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def peft_config(config: Any, base_name: str) -> dict[str, Any]:
    """The fields of a LoraConfig as its file has them."""
    return {**config.to_dict(), "base_model_name_or_path": base_name, "inference_mode": True}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write both files, the configuration last: a folder that has one is complete.

    Args:
        dtype: of the tensors that are no indices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cast = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    (folder / WEIGHTS_FILE).write_bytes(save(cast, metadata={"format": "pt"}))  # as readable as other files
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets have no order of their own
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
