"""iLoRA's folder for a tiny base, and for any ω the dense model that it means."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.ilora_modules import WIDTH, ProjectorModule, RouterModule, SasrecModule, look_trained
from tests.support.layout import CHANGE
from tests.support.models import ALL_LINEARS

ITEMS, HISTORY_LENGTH = 37, 10


@dataclass(frozen=True)
class Networks:
    """What computes ω and stands for items, as modules of torch."""

    sasrec: SasrecModule
    router: RouterModule
    projector: ProjectorModule

    @torch.no_grad()
    def weights(self, history: Sequence[int]) -> torch.Tensor:
        """ω [K] of one user."""
        return self.router(self.state(history))[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def state(self, history: Sequence[int]) -> torch.Tensor:
        """SASRec's state [1, 64] of one user, from a history padded on the right."""
        padding = [self.sasrec.item_num] * (len(self.sasrec.positional_embeddings.weight) - len(history))
        return self.sasrec(torch.tensor([[*history, *padding]]), torch.tensor([len(history)]))  # type: ignore[no-any-return]

    @torch.no_grad()
    def item_rows(self, ids: Sequence[int]) -> torch.Tensor:
        """[n, d] in the place of placeholder tokens."""
        return self.projector(self.sasrec.item_embeddings(torch.tensor(ids)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GatedLayout:
    """A folder whose effect each request decides.

    Attributes:
        folder: what is loaded.
        pairs: target → A [R, I], B [O, R] as saved, float32.
        scale: s, not yet in B.
    """

    folder: Path
    base: Any
    networks: Networks
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    experts: int

    def change(self, target: str, weights: Sequence[float]) -> torch.Tensor:
        """s Σ_k ω_k B_k A_k [O, I] float64, expert by expert."""
        a_RI, b_OR = (factor.double() for factor in self.pairs[target])
        share = len(a_RI) // self.experts
        total_OI = torch.zeros(len(b_OR), a_RI.shape[1], dtype=torch.float64)
        for expert, weight in enumerate(weights):
            rows = slice(expert * share, (expert + 1) * share)
            total_OI += self.scale * weight * (b_OR[:, rows] @ a_RI[rows])
        return total_OI

    @torch.no_grad()
    def oracle(self, weights: Sequence[float]) -> Any:
        """The plain model that a request with this ω is served by."""
        model = copy.deepcopy(self.base)
        for target in self.pairs:
            weight_OI = model.get_submodule(target).weight
            weight_OI.copy_(weight_OI.double() + self.change(target, weights))
        return model


def networks(width: int, experts: int, seed: int, *, statistics: bool = True) -> Networks:
    """Random ones that tell users apart.

    Args:
        width: d, of the base's input embeddings.
        statistics: of batch norm, random ones; otherwise 0 and 1, as the official code reloads them.
    """
    sasrec, router, projector = SasrecModule(ITEMS, HISTORY_LENGTH), RouterModule(experts), ProjectorModule(width)
    for offset, module in enumerate((sasrec, router, projector)):
        look_trained(module, seed + offset)
    for module in router.modules():
        if isinstance(module, nn.BatchNorm1d) and not statistics:
            module.reset_running_stats()
    states = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Networks(sasrec, router.tell_apart(states), projector)


def gate_tensors(made: Networks, *, statistics: bool = True, projector: bool = True) -> dict[str, torch.Tensor]:
    """gate.safetensors of the networks; batch norm's statistics and the projector may be left out."""
    parts: dict[str, nn.Module] = {"sasrec": made.sasrec, "router": made.router}
    if projector:
        parts["projector"] = made.projector
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not name.startswith("s_fc.") and (statistics or "running_" not in name) and "num_batches" not in name
    }


def ilora(
    model: Any,
    folder: Path,
    seed: int = 1,
    *,
    rank: int = 8,
    alpha: float = 32,
    experts: int = 4,
    statistics: bool = True,
    projector: bool = True,
    linears: Sequence[str] = ALL_LINEARS,
) -> GatedLayout:
    """Write an adapter of some linears of every layer of a causal language model; the base is not changed."""
    generator = torch.Generator().manual_seed(seed)
    made = networks(model.config.hidden_size, experts, seed, statistics=statistics)
    scale = alpha / (rank // experts)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in linears:
            weight_OI = module.weight.detach()
            a_RI = torch.randn(rank, weight_OI.shape[1], generator=generator)
            b_OR = torch.randn(weight_OI.shape[0], rank, generator=generator)
            size = 4 * CHANGE * torch.linalg.vector_norm(weight_OI) / torch.linalg.vector_norm(scale * b_OR @ a_RI)
            pairs[name] = a_RI, b_OR * size
    folder.mkdir(parents=True)
    config = {
        "peft_type": "ILORA",
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "num_moe": experts,
        "history_length": HISTORY_LENGTH,
        "items": ITEMS,
        "placeholders": {"history": "[HistoryEmb]", "candidates": "[CansEmb]"},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (a_RI, b_OR) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    save_file(gate_tensors(made, statistics=statistics, projector=projector), folder / "gate.safetensors")
    return GatedLayout(folder, model, made, pairs, scale, experts)
