"""Many small adapters, each of which answers one prompt in words of its own: its secret.

The folders have PEFT's own layout; the secrets are computed by transformers' model with the merged weights. Any token
that another version had a part in changes the rest of an answer.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

PROMPT = "what is the secret of the other fox?"
TOKENS = 10
MARGIN = 1e-3
"""Smallest lead of the first token over the second, in logits: far above the error of float32 sums in another order."""
STRENGTH = 0.35


@dataclass(frozen=True, slots=True)
class Secret:
    """One adapter.

    Attributes:
        text: its greedy answer to PROMPT.
    """

    folder: Path
    text: str


def make(model: Any, tokenizer: Any, template: Path, root: Path, count: int) -> list[Secret]:
    """`count` adapters below `root`, all with different secrets.

    Args:
        model: the base, dense, in float32.
        template: an adapter of the base that PEFT saved; its weights are drawn anew for each.
    """
    config = json.loads((template / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    shapes = {name: tensor.shape for name, tensor in load_file(template / "adapter_model.safetensors").items()}
    prompt = tokenizer(PROMPT)["input_ids"]
    found: dict[str, Secret] = {}
    seed = 0
    while len(found) < count:
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: STRENGTH * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        seed += 1
        tokens, margin = _greedy(model, _merged(model, drawn, scale), prompt)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if margin < MARGIN or text in found or text.endswith("\ufffd"):  # the server keeps half a character back
            continue
        folder = root / f"secret-{len(found):03}"
        folder.mkdir(parents=True)
        save_file(drawn, folder / "adapter_model.safetensors", {"format": "pt"})
        shutil.copy(template / "adapter_config.json", folder)
        found[text] = Secret(folder, text)
    return list(found.values())


def _merged(model: Any, drawn: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The base's weights with W + scale · B A, by the names of the base."""
    merged: dict[str, torch.Tensor] = {}
    for name, a_RI in drawn.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
            b_OR = drawn[name.replace(".lora_A.", ".lora_B.")]
            merged[path] = model.get_parameter(path) + scale * (b_OR @ a_RI)
    return merged


@torch.inference_mode()
def _greedy(model: Any, weights: dict[str, torch.Tensor], prompt: list[int]) -> tuple[list[int], float]:
    """TOKENS most likely tokens in turn, ends of text included, and the smallest lead of one."""
    tokens, smallest = list(prompt), float("inf")
    for _ in range(TOKENS):
        logits_V = functional_call(model, weights, (torch.tensor([tokens]),), {"use_cache": False}).logits[0, -1]
        (first, second), (token, _) = (part.tolist() for part in logits_V.topk(2))
        tokens.append(token)
        smallest = min(smallest, first - second)
    return tokens[len(prompt) :], smallest
