"""A checkpoint as EMTAL's code leaves it, of a tiny vision transformer, and what such a checkpoint computes.

Must not know: how Motet reads it. The forward is written by hand over the checkpoint's own names.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

HEADS, HIDDEN, CHANNELS, CLASSES, LAYERS, RANK, EXPERTS = 3, 24, 36, 7, 2, 3, 4
IMAGE, PATCH = 16, 8
TEMPERATURE = 5.0


def tiny_vit(seed: int = 0, **changes: Any) -> Any:
    """A ViT of transformers with timm's epsilon; every tensor random, so that none can stand for another."""
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=CHANNELS,
        image_size=IMAGE,
        patch_size=PATCH,
        num_labels=CLASSES,
        **{"layer_norm_eps": 1e-6, **changes},
    )
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@dataclass
class Official:
    """What timm's saver stores of a run of EMTAL, to be changed and written.

    Attributes:
        state: the raw weights.
        rest: the other entries of the checkpoint.
    """

    state: dict[str, torch.Tensor]
    rest: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> Path:
        torch.save({"state_dict": self.state, **self.rest}, file)
        return file


@torch.no_grad()
def official(model: Any, seed: int = 1) -> Official:
    """Cluster the model's channels at random, give it trained-looking pairs, routers and head.

    Args:
        model: ViTForImageClassification; never changed.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    vit, state = copy.deepcopy(model.vit), {}
    state["cls_token"] = vit.embeddings.cls_token
    state["pos_embed"] = vit.embeddings.position_embeddings
    linears = {"patch_embed.proj": vit.embeddings.patch_embeddings.projection, "norm": vit.layernorm}
    for layer, block in enumerate(vit.layers):
        stem, attention, mlp = f"blocks.{layer}", block.attention, block.mlp
        order = torch.randperm(CHANNELS, generator=generator)
        mlp.fc1.weight.copy_(mlp.fc1.weight[order].clone())
        mlp.fc1.bias.copy_(mlp.fc1.bias[order].clone())
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order].clone())
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{stem}.attn.qkv.weight"] = torch.cat([part.weight for part in parts])
        if model.config.qkv_bias:
            state[f"{stem}.attn.qkv.bias"] = torch.cat([part.bias for part in parts])
        linears |= {f"{stem}.attn.proj": attention.o_proj, f"{stem}.mlp.fc1": mlp.fc1, f"{stem}.mlp.fc2": mlp.fc2}
        linears |= {f"{stem}.norm1": block.layernorm_before, f"{stem}.norm2": block.layernorm_after}
        for name, wide in (("qkv", 3 * HIDDEN), ("proj", HIDDEN)):
            state[f"{stem}.attn.lora_{name}"] = random(HIDDEN, RANK)
            state[f"{stem}.attn.lora_{name}2"] = random(RANK, wide)
        for name, narrow, wide in (("fc1", HIDDEN, CHANNELS), ("fc2", CHANNELS, HIDDEN)):
            state[f"{stem}.mlp.lora_{name}_a"] = random(narrow, RANK)
            state[f"{stem}.mlp.lora_{name}_b"] = random(RANK, wide)
        state[f"{stem}.mlp.gate_weight_lora.weight"] = random(EXPERTS, HIDDEN)
    for name, module in linears.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    state |= {"head.weight": random(CLASSES, HIDDEN), "head.bias": random(CLASSES)}
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    options = argparse.Namespace(model="vit_base_patch16_224_in21k_ssf", epochs=100, resume="", start_epoch=None)
    rest = {
        "epoch": 99,
        "arch": options.model,
        "version": 2,
        "args": options,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999)}],
        },
        "state_dict_ema": {name: tensor + 1 for name, tensor in state.items()},
        "metric": 91.73,
    }
    return Official(state, rest)


@torch.no_grad()
def timm_forward(state: dict[str, torch.Tensor], images_BCHW: torch.Tensor, fading: float = 1.0) -> torch.Tensor:
    """Logits [B, C] of a checkpoint's raw weights."""

    def linear(name: str, x_BTI: torch.Tensor) -> torch.Tensor:
        return x_BTI @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    def normed(name: str, x_BTI: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_BTI, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    projection, bias = (state[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    patches_BTI = F.conv2d(images_BCHW, projection, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(images_BCHW), -1, -1), patches_BTI], dim=1) + state["pos_embed"]
    for layer in range(LAYERS):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        z = normed(f"blocks.{layer}.norm1", x)
        qkv = linear(f"{attn}.qkv", z) + z @ state[f"{attn}.lora_qkv"] @ state[f"{attn}.lora_qkv2"]
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5).softmax(-1)
        z = (weights @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{attn}.proj", z) + z @ state[f"{attn}.lora_proj"] @ state[f"{attn}.lora_proj2"]
        z = normed(f"blocks.{layer}.norm2", x)
        share = (linear(f"{mlp}.gate_weight_lora", z) / TEMPERATURE).softmax(-1)
        scales = EXPERTS * ((1 - fading) * share + fading / EXPERTS)
        h = linear(f"{mlp}.fc1", z) + z @ state[f"{mlp}.lora_fc1_a"] @ state[f"{mlp}.lora_fc1_b"]
        h = F.gelu(h * scales.repeat_interleave(CHANNELS // EXPERTS, dim=-1))
        x = x + linear(f"{mlp}.fc2", h) + h @ state[f"{mlp}.lora_fc2_a"] @ state[f"{mlp}.lora_fc2_b"]
    return linear("head", normed("norm", x)[:, 0])
