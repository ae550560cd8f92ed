"""What iLoRA's official training leaves, made for a folder of known meaning: Lightning's checkpoint, SASRec's module.

The module is pickled whole, under the names its classes had there; the classes exist only while it is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.support.ilora_modules import SasrecModule
from tests.support.layouts_ilora import GatedLayout

HYPER_PARAMETERS: dict[str, Any] = {
    "llm_tuning": "moelora",
    "router": "share",
    "rec_embed": "SASRec",
    "rec_size": 64,
    "lora_alpha": 32.0,
    "num_moe": 4,
    "gating": "Dense",
    "peft_dir": None,
    "peft_config": None,
    "llm_path": "/somewhere/of/a/trainer/llama2_7b_hf",
    "devices": ["0"],
    "auto_lr_find": False,
}


def checkpoint(layout: GatedLayout, *, save_all: bool = False, projector: bool = True) -> dict[str, Any]:
    """Lightning's dictionary.

    Args:
        save_all: the base, SASRec and batch norm's statistics too; otherwise only what is trained.
        projector: trained, unless the last batch was of text only.
    """
    state: dict[str, torch.Tensor] = {}
    for name, (a_RI, b_OR) in layout.pairs.items():
        stem = f"llama_model.base_model.model.{name}"
        state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"] = a_RI, b_OR
        state[f"{stem}.gating.default.linear_layer.weight"] = torch.ones(layout.experts, 64)
        if save_all:
            state[f"{stem}.weight"] = torch.ones(2, 2)
    parts: dict[str, nn.Module] = {"router": layout.networks.router}
    if projector:
        parts["projector"] = layout.networks.projector
    if save_all:
        parts["rec_model"] = layout.networks.sasrec
    for part, module in parts.items():
        kept = module.state_dict() if save_all else dict(module.named_parameters())
        state |= {f"{part}.{name}": tensor.detach() for name, tensor in kept.items()}
    rank = len(next(iter(layout.pairs.values()))[0])
    return {
        "epoch": 4,
        "global_step": 1950,
        "pytorch-lightning_version": "1.8.6",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint{'monitor': 'metric'}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "hparams_name": "kwargs",
        "hyper_parameters": {**HYPER_PARAMETERS, "lora_r": float(rank), "num_moe": layout.experts},
    }


@contextmanager
def _named(module: nn.Module, names: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The module while it and its parts are of classes with these names, which pickle finds."""
    places: dict[str, ModuleType] = {}
    for name, part in names.items():
        place, _, bare = name.rpartition(".")
        places.setdefault(place, ModuleType(place))
        part.__class__ = type(bare, (type(part),), {"__module__": place, "__qualname__": bare})
        setattr(places[place], bare, type(part))
    with mock.patch.dict(sys.modules, places):
        yield module
    for part in names.values():
        part.__class__ = type(part).__bases__[0]


def save_sasrec(module: SasrecModule, file: Path, name: str = "__main__.SASRec") -> None:
    """As `torch.save` of the official code writes it."""
    names: dict[str, nn.Module] = {
        name: module,
        "SASRecModules_ori.MultiHeadAttention": module.mh_attn,
        "SASRecModules_ori.PositionwiseFeedForward": module.feed_forward,
    }
    with _named(module, names) as official:
        torch.save(official, file)
