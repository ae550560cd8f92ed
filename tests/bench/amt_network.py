"""A saved pool as it was trained, to take features from under any weights, and to attack. Knows no domains.

Not the served form: the bench compares the two.

Shapes: B rows, T positions, D width, N queries, C classes, P members.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes.adversary import cosines, last, padded, perturbed
from motet.adapters.recipes.amt import LAYERS
from motet.adapters.recipes.halves import cut, states
from motet.adapters.recipes.pool_network import put_into

AT_ONCE = 32
"""Rows of a batch; rows of like length go together."""

Alpha = tuple[float, ...] | None
"""Weights of the members; None is the base as it is."""


class Network:
    """One decoder, its last layers twice: with the pool, and without."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Give the model away.

        Args:
            model: float32, of transformers.
            folder: of the pool.
        """
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        decoder = model.eval().requires_grad_(False).model
        plain = copy.deepcopy(decoder.layers[-LAYERS:])
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
        self.pool = put_into(model, targets, LAYERS, config["r"], config["lora_alpha"], config["members"])
        for path, module in self.pool.linears.items():
            for member in range(config["members"]):
                module.a_PRI[member].data = tensors[f"{PREFIX}{path}.lora_A.{member}.weight"]
                module.b_POR[member].data = tensors[f"{PREFIX}{path}.lora_B.{member}.weight"]
        self.pool.requires_grad_(False)
        self.lower, self.upper = cut(decoder, LAYERS)
        self.base = copy.copy(self.upper)
        self.base._modules = {**self.upper._modules, "layers": plain}
        self.embed, self._tokenizer = decoder.embed_tokens, tokenizer
        self.unit = float(torch.linalg.vector_norm(self.embed.weight, dim=1).mean())
        self.members, self.scale = config["members"], config["scale_cls"]

    def alone(self, member: int) -> Alpha:
        """The weights of one member by itself."""
        return tuple(float(member == place) for place in range(self.members))

    def ids(self, text: str) -> list[int]:
        """As merges read it."""
        return list(self._tokenizer(text, add_special_tokens=True)["input_ids"])

    @torch.no_grad()
    def below(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Text → the states [T, D] that enter the last layers."""
        found: dict[str, torch.Tensor] = {}
        rows = sorted({text: self.ids(text) for text in texts}.items(), key=lambda row: len(row[1]))
        for at in range(0, len(rows), AT_ONCE):
            part = rows[at : at + AT_ONCE]
            ids_BT, last_B = padded([row for _, row in part])
            states_BTD = states(self.lower, self.embed(ids_BT))
            for (text, _), row_TD, end in zip(part, states_BTD, last_B.tolist(), strict=True):
                found[text] = row_TD[: end + 1].clone()
        return found

    @torch.no_grad()
    def features(self, below: Sequence[torch.Tensor], alpha: Alpha) -> torch.Tensor:
        """[B, D] float32, in the order of what `below` gave."""
        order = sorted(range(len(below)), key=lambda place: len(below[place]))
        made = torch.empty(len(below), below[0].shape[1])
        for at in range(0, len(order), AT_ONCE):
            part = order[at : at + AT_ONCE]
            given_BTD = torch.nn.utils.rnn.pad_sequence([below[place] for place in part], batch_first=True)
            ends_B = torch.tensor([len(below[place]) - 1 for place in part])
            made[part] = last(self._above(given_BTD, alpha), ends_B)
        return made

    def attacked(
        self,
        texts: Sequence[str],
        labels_N: torch.Tensor,
        classifiers: Sequence[tuple[Alpha, torch.Tensor]],
        strengths: Sequence[float],
    ) -> list[list[torch.Tensor]]:
        """Features [N, D] of the texts when each classifier is attacked by its own gradient.

        Args:
            classifiers: weights and class means [C, D] each.
            strengths: how far each token moves, as a share of the mean norm of the embeddings.

        Returns:
            One list a classifier, one entry a strength.
        """
        ids_BT, last_B = padded([self.ids(text) for text in texts])
        embedded_BTD = self.embed(ids_BT).detach().requires_grad_()
        entering_BTD = states(self.lower, embedded_BTD)
        found: list[list[torch.Tensor]] = []
        for alpha, means_CD in classifiers:
            logits_NC = self.scale * cosines(last(self._above(entering_BTD, alpha), last_B), means_CD)
            loss = torch.nn.functional.cross_entropy(logits_NC, labels_N)
            (gradient_BTD,) = torch.autograd.grad(loss, embedded_BTD, retain_graph=True)
            with torch.no_grad():
                moved = (perturbed(embedded_BTD, gradient_BTD, strength * self.unit) for strength in strengths)
                found.append([last(self._above(states(self.lower, one), alpha), last_B) for one in moved])
        return found

    def _above(self, given_BTD: torch.Tensor, alpha: Alpha) -> torch.Tensor:
        if alpha is None:
            return states(self.base, given_BTD)
        self.pool.mix(alpha)
        return states(self.upper, given_BTD)
