"""Checkpoints as AMT's code writes them, for a tiny vision transformer, beside the model that each mixture is.

Must not know: how Motet reads them. Names and shapes are those of the authors' code; the forward is written out from
the architecture's definition, in float64, and shares nothing with transformers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from tests.support.layout import CHANGE

LAYERS, HIDDEN, HEADS, FEED, IMAGE, PATCH, RANK = 2, 24, 3, 48, 16, 8, 3
PARTS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
"""Linear → of how many independent blocks of rows it is made."""

State = dict[str, torch.Tensor]


def tiny_vit(head: bool = False) -> Any:
    """A ViT as transformers has it, with weights that matter."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED,
        image_size=IMAGE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    model = ViTForImageClassification(config) if head else ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def dino_names(model: Any) -> State:
    """The model's tensors, without a head, as DINO names them."""
    own = {name.removeprefix("vit."): values.detach() for name, values in model.state_dict().items()}
    state = {
        "cls_token": own["embeddings.cls_token"],
        "pos_embed": own["embeddings.position_embeddings"],
        "patch_embed.proj.weight": own["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": own["embeddings.patch_embeddings.projection.bias"],
    }
    for kind in ("weight", "bias"):
        for i in range(LAYERS):
            here, there = f"blocks.{i}", f"layers.{i}"
            state[f"{here}.norm1.{kind}"] = own[f"{there}.layernorm_before.{kind}"]
            state[f"{here}.attn.qkv.{kind}"] = torch.cat([own[f"{there}.attention.{x}_proj.{kind}"] for x in "qkv"])
            state[f"{here}.attn.proj.{kind}"] = own[f"{there}.attention.o_proj.{kind}"]
            state[f"{here}.norm2.{kind}"] = own[f"{there}.layernorm_after.{kind}"]
            state[f"{here}.mlp.fc1.{kind}"] = own[f"{there}.mlp.fc1.{kind}"]
            state[f"{here}.mlp.fc2.{kind}"] = own[f"{there}.mlp.fc2.{kind}"]
        state[f"norm.{kind}"] = own[f"layernorm.{kind}"]
    return {name: values.clone() for name, values in state.items()}


@dataclass(frozen=True)
class Official:
    """A pool before it is packed into files.

    Attributes:
        residual: the backbone with W_res in place of W, DINO's names.
        pairs: a member each: linear → fused lora_A [k·r, I] and lora_B [O, r].
        scales_cls: of each member's classifier.
    """

    residual: State
    pairs: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]
    scales_cls: Sequence[float]

    def merged(self, alpha: Sequence[float]) -> State:
        """W_res + Σ α_p B_p A_p, float64, biases and all the rest as they are."""
        state = {name: values.double() for name, values in self.residual.items()}
        for weight, pairs in zip(alpha, self.pairs, strict=True):
            for linear, (a_RI, b_OR) in pairs.items():
                state[f"{linear}.weight"] = state[f"{linear}.weight"] + weight * product(linear, a_RI, b_OR)
        return state

    def of_member(self, place: int, **args: Any) -> dict[str, Any]:
        """What the training script saves of one member."""
        model = {f"backbone.{name}": values for name, values in self.residual.items()}
        for linear, (a_RI, b_OR) in self.pairs[place].items():
            model |= {f"backbone.{linear}.lora_A": a_RI, f"backbone.{linear}.lora_B": b_OR}
        return self._saved(model, self.scales_cls[place], args)

    def packed(self, **args: Any) -> dict[str, Any]:
        """What the test script loads: all members beside each other."""
        model = {f"backbone.model.{name}": values for name, values in self.residual.items()}
        for place, pairs in enumerate(self.pairs):
            for linear, (a_RI, b_OR) in pairs.items():
                stem = f"backbone.model.{linear}"
                model |= {f"{stem}.lora_A.{place}": a_RI, f"{stem}.lora_B.{place}": b_OR}
        return self._saved(model, self.scales_cls[0], args)

    def _saved(self, model: State, scale_cls: float, args: Mapping[str, Any]) -> dict[str, Any]:
        state = {"bias": torch.zeros(1), "scale_cls": torch.tensor([scale_cls]), **model}
        return {
            "model": {name: values.clone() for name, values in state.items()},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 5e-4}]},
            "epoch": 29,
            "model_ema": None,
            "args": argparse.Namespace(arch="dino_small_patch16_amt", **args),
        }


def official(base: State, members: int, seed: int = 1) -> Official:
    """Split W as the authors do, block by block, and move every member away from the start."""
    generator = torch.Generator().manual_seed(seed)
    residual = copy.deepcopy(base)
    pairs: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(members)]
    for linear in (f"blocks.{i}.{kind}" for i in range(LAYERS) for kind in PARTS):
        weight_OI = base[f"{linear}.weight"]
        starts = [split(block) for block in weight_OI.chunk(PARTS[linear.split(".", 2)[2]])]
        a_RI, b_OR = torch.cat([a for a, _ in starts]), torch.cat([b for _, b in starts])
        residual[f"{linear}.weight"] = weight_OI - product(linear, a_RI, b_OR).float()
        for of_member in pairs:
            noise = [torch.randn(f.shape, generator=generator) * f.square().mean().sqrt() for f in (a_RI, b_OR)]
            moved = product(linear, noise[0], b_OR) + product(linear, a_RI, noise[1])
            size = CHANGE * weight_OI.norm() / moved.norm()
            of_member[linear] = ((a_RI + size * noise[0]).float(), (b_OR + size * noise[1]).float())
    return Official(residual, pairs, [10.0 + 0.25 * place for place in range(members)])


def split(block_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """√Σ Vᵀ and U √Σ of the leading components."""
    u_OK, values_K, v_KI = torch.linalg.svd(block_OI, full_matrices=False)
    root_R = values_K[:RANK].sqrt()
    return root_R[:, None] * v_KI[:RANK], u_OK[:, :RANK] * root_R


def product(linear: str, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """The change of a fused pair [O, I] float64: its blocks of rows have a pair each."""
    parts = PARTS[linear.split(".", 2)[2]]
    return torch.cat([b.double() @ a.double() for a, b in zip(a_RI.chunk(parts), b_OR.chunk(parts), strict=True)])


def features(state: Mapping[str, torch.Tensor], pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """[N, D] float64: the class token after the final norm of a pre-norm vision transformer."""
    s = {name: values.double() for name, values in state.items()}

    def norm(name: str, x_NTD: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_NTD, (HIDDEN,), s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)

    def linear(name: str, x_NTD: torch.Tensor) -> torch.Tensor:
        return x_NTD @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    patches = F.conv2d(pixels_NCHW.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=PATCH)
    x_NTD = torch.cat([s["cls_token"].expand(len(pixels_NCHW), -1, -1), patches.flatten(2).mT], 1) + s["pos_embed"]
    for i in range(LAYERS):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x_NTD)).chunk(3, -1)
        attended = []
        for columns in torch.arange(HIDDEN).chunk(HEADS):
            weights_NTT = (q[..., columns] @ k[..., columns].mT / len(columns) ** 0.5).softmax(-1)
            attended.append(weights_NTT @ v[..., columns])
        x_NTD = x_NTD + linear(f"blocks.{i}.attn.proj", torch.cat(attended, -1))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x_NTD)))
        x_NTD = x_NTD + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x_NTD)[:, 0]


def save(content: Mapping[str, Any], file: Path) -> Path:
    torch.save(dict(content), file)
    return file


BASES: dict[str, tuple[bool, str]] = {
    "ViTModel's folder": (False, "folder"),
    "a classifier's folder": (True, "folder"),
    "DINO's pickle": (False, "dino.pth"),
    "timm's safetensors": (False, "timm.safetensors"),
}
"""What the base is given as: whether with a head, and the name of the file or folder."""


@dataclass(frozen=True)
class Made:
    """A base in one of its forms and a pool of three members trained on it."""

    model: Any
    base: Path
    pool: Official

    def checkpoints(self, folder: Path, packed: bool = False, **args: Any) -> list[Path]:
        if packed:
            return [save(self.pool.packed(), folder / "merge.pth")]
        return [save(self.pool.of_member(p, **args), folder / f"best-{p}.pth") for p in range(3)]


def made(folder: Path, base: str = "DINO's pickle", seed: int = 1) -> Made:
    head, name = BASES[base]
    model, path = tiny_vit(head), folder / name
    state = dino_names(model)
    if name == "folder":
        model.save_pretrained(path)
    elif path.suffix == ".pth":
        save(state, path)
    else:
        save_file({**state, "head.weight": torch.ones(2, 2)}, path)
    return Made(model, path, official(state, members=3, seed=seed))
