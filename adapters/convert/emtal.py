"""Converts a checkpoint of EMTAL's authors, a pickle of a whole timm vision transformer, to a PEFT LoRA folder.

Must not know: the registry, servers. Runs offline. The checkpoint keeps the feed-forward channels in the order of
their clusters and does not say which; they are recognised by their rows among the base's and put back:

    fc1: A = aᵀ, B = bᵀ[inverse]   fc2: A = aᵀ[:, inverse], B = bᵀ   qkv: one A, B = bᵀ by rows   proj: A = aᵀ, B = bᵀ

Everything that was not trained must be the base's bit for bit. The router scales channels until its fading

    f = min(epochs trained / 55, 1)

is 1, and then does nothing; the checkpoint does not store f. The official run fades over the first half of 110 epochs
step by step, so f is that of the step that would come next. It is evaluated with its raw weights, never the averaged
ones beside them.

Source: the layout of the authors' code, https://arxiv.org/abs/2501.06884; timm's rule for counting epochs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from motet.adapters.bounded import DEFAULT_LIMITS
from motet.adapters.checkpoint import read_checkpoint
from motet.adapters.convert.folder import new_folder, require_new
from motet.adapters.convert.plain_pickle import read_plain_pickle
from motet.adapters.convert.timm_vit import under_timm_names
from motet.adapters.errors import (
    ConfigError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from motet.adapters.methods.permutation import order_of
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE

FADING_EPOCHS = 55
"""Half of the 110 epochs that the official code counts on."""

TARGETS = ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"]
HEAD, CLASSIFIER = "head", "classifier"


def convert(checkpoint_file: Path, base_folder: Path, out_folder: Path, fading_epochs: int = FADING_EPOCHS) -> None:
    """Write the adapter for transformers' ViTForImageClassification, its classifier beside the pairs.

    Args:
        checkpoint_file: timm's `model_best.pth.tar`; only tensors and plain values are read from it.
        base_folder: the ViT that was clustered, config.json and safetensors, as transformers saves it.
        out_folder: is made; names are those of transformers 5, alpha is r, so that the scale is 1.
        fading_epochs: after how many epochs the router had faded.

    Raises:
        AdapterExistsError: `out_folder` is there already.
        UnsafeFormatError: the checkpoint holds more than tensors and plain values.
        UnsupportedError: the router had not faded.
        FormatError: the checkpoint is not one of EMTAL's, is incomplete, or was trained on another base.
    """
    require_new(out_folder)
    saved = read_plain_pickle(checkpoint_file)
    _require_faded(saved, fading_epochs)
    config, base_tensors, _ = read_checkpoint(base_folder, DEFAULT_LIMITS)
    base = under_timm_names(config, base_tensors)
    state = _state(saved)
    bag = TensorBag(state)
    orders = _orders(bag, base, base_folder.name)
    rank = _size(state, "blocks.0.mlp.lora_fc1_a", 1)
    tensors: dict[str, torch.Tensor] = {}
    for layer, order_F in enumerate(orders):
        for target, (a_RI, b_OR) in _pairs(bag, f"blocks.{layer}", base, rank, order_F).items():
            stem = f"{PREFIX}vit.layers.{layer}.{target}"
            tensors[f"{stem}.lora_A.weight"] = a_RI.clone(memory_format=torch.contiguous_format)
            tensors[f"{stem}.lora_B.weight"] = b_OR.clone(memory_format=torch.contiguous_format)
        _take_router(bag, state, f"blocks.{layer}.mlp", base)
    classes, hidden = _size(state, f"{HEAD}.weight", 0), base["norm.weight"].shape[0]
    tensors[f"{PREFIX}{CLASSIFIER}.weight"] = bag.take(f"{HEAD}.weight", (classes, hidden)).contiguous()
    tensors[f"{PREFIX}{CLASSIFIER}.bias"] = bag.take(f"{HEAD}.bias", (classes,)).contiguous()
    bag.require_empty()
    _write(out_folder, tensors, rank)


def _state(saved: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    state = saved.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ConfigError("the checkpoint has no state_dict of tensors; give what timm saved of the run")
    return state


def _require_faded(saved: Mapping[str, Any], fading_epochs: int) -> None:
    epoch, version, args = saved.get("epoch"), saved.get("version", 1), saved.get("args")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ConfigError(f"the checkpoint has epoch={epoch!r}; without it nobody knows whether the router had faded")
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if options.get("resume") or options.get("start_epoch"):
        raise UnsupportedError(
            "the run was resumed, and the official code then starts the fading again from 0, so that the epoch does "
            "not tell how far it came; convert a checkpoint of a run in one piece"
        )
    # timm counts from 0 since version 2 of its checkpoints; before, the number was raised before saving.
    done = epoch + 1 if isinstance(version, int) and version > 1 else epoch
    if done < fading_epochs:
        raise UnsupportedError(
            f"the checkpoint is of epoch {epoch}, where the fading is {done / fading_epochs:.3f}: below 1, the router "
            "still scales the feed-forward channels of every token, which no fixed change of the weights can say; "
            f"convert one with {fading_epochs} epochs behind it, or say with --fading-epochs when the router had faded"
        )


def _orders(bag: TensorBag, base: Mapping[str, torch.Tensor], base_name: str) -> list[torch.Tensor]:
    """For each block, the base's place of every feed-forward channel [F]; takes all that was not trained.

    Raises:
        ConfigError: a tensor is not the base's.
    """
    orders: list[torch.Tensor] = []
    for name, expected in base.items():
        found = bag.take(name, tuple(expected.shape))
        if name.endswith("mlp.fc1.weight"):
            order_F = order_of(found, expected, f"the rows of {name!r}")
            orders.append(torch.arange(len(found)) if order_F is None else order_F)
        if name.endswith(("mlp.fc1.weight", "mlp.fc1.bias")):
            expected = expected[orders[-1]]
        elif name.endswith("mlp.fc2.weight"):
            expected = expected[:, orders[-1]]
        if not torch.equal(found, expected):
            raise ConfigError(
                f"tensor {name!r} of the checkpoint is not that of the base {base_name!r}: it was trained on another "
                "model, or the base was saved with fewer digits; give the ViT that was clustered, in float32"
            )
    return orders


def _pairs(
    bag: TensorBag, block: str, base: Mapping[str, torch.Tensor], rank: int, order_F: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path below the layer in transformers → A [R, I] and B [O, R], channels where the base has them."""

    def take(a_name: str, b_name: str, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        out_width, in_width = base[f"{block}.{linear}.weight"].shape
        a_IR = bag.take(f"{block}.{a_name}", (in_width, rank))
        return a_IR.T, bag.take(f"{block}.{b_name}", (rank, out_width)).T

    inverse_F = order_F.argsort()
    a_up, b_up = take("mlp.lora_fc1_a", "mlp.lora_fc1_b", "mlp.fc1")
    a_down, b_down = take("mlp.lora_fc2_a", "mlp.lora_fc2_b", "mlp.fc2")
    a_qkv, b_qkv = take("attn.lora_qkv", "attn.lora_qkv2", "attn.qkv")
    b_q, b_k, b_v = b_qkv.chunk(3)
    return {
        "attention.q_proj": (a_qkv, b_q),
        "attention.k_proj": (a_qkv, b_k),
        "attention.v_proj": (a_qkv, b_v),
        "attention.o_proj": take("attn.lora_proj", "attn.lora_proj2", "attn.proj"),
        "mlp.fc1": (a_up, b_up[inverse_F]),
        "mlp.fc2": (a_down[:, inverse_F], b_down),
    }


def _take_router(bag: TensorBag, state: Mapping[str, Any], mlp: str, base: Mapping[str, torch.Tensor]) -> None:
    """Without effect once faded; but what it should look like is known."""
    name = f"{mlp}.gate_weight_lora.weight"
    channels, hidden = base[f"{mlp}.fc1.weight"].shape
    experts = _size(state, name, 0)
    bag.take(name, (experts, hidden))
    if channels % max(experts, 1):
        raise ShapeError(
            f"tensor {name!r} has {experts} rows, which do not divide the {channels} channels evenly; it is no router "
            "of this base"
        )


def _size(state: Mapping[str, torch.Tensor], name: str, dimension: int) -> int:
    """A size that only the checkpoint knows.

    Raises:
        MissingTensorError, ShapeError: there is no such matrix, or it is empty.
    """
    if name not in state:
        raise MissingTensorError(f"tensor {name!r} is missing; the checkpoint is not one of EMTAL's, or incomplete")
    if state[name].dim() != 2 or not state[name].numel():
        raise ShapeError(f"tensor {name!r} has shape {list(state[name].shape)}; it must be a matrix, not empty")
    return state[name].shape[dimension]


def _write(out_folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": TARGETS,
        "modules_to_save": [CLASSIFIER],
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    with new_folder(out_folder) as made:
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
