"""AMT: a pool of members in one folder, for a tiny base, and the dense model that each mixture of them is.

Must not know: how Motet reads a pool. The oracle is W_res + Σ_p α_p s·B_p A_p in float64, written into a copy.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.layout import CHANGE

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, I] and B [O, r], float32."""


@dataclass(frozen=True)
class PoolLayout:
    """A folder as it would be published.

    Attributes:
        folder: what is loaded.
        model: the untouched base.
        scale: s.
        starts: target → the pair the members were trained from; empty where that is the base itself.
        members: target → P pairs.
    """

    folder: Path
    model: Any
    scale: float
    starts: Mapping[str, Pair]
    members: Mapping[str, Sequence[Pair]]

    def delta(self, target: str, alpha: Sequence[float]) -> torch.Tensor:
        """ΔW [O, I] float64 on the base of the mixture α."""
        pairs = self.members[target]
        delta_OI = sum(weight * _product(pair) for weight, pair in zip(alpha, pairs, strict=True))
        if target in self.starts:
            delta_OI = delta_OI - _product(self.starts[target])
        return self.scale * delta_OI

    def oracle(self, alpha: Sequence[float]) -> Any:
        """The model with the mixture α merged into its weights, float32."""
        merged = copy.deepcopy(self.model)
        with torch.no_grad():
            for target in self.members:
                weight_OI = merged.get_submodule(target).weight
                weight_OI.copy_(weight_OI.double() + self.delta(target, alpha))
        return merged

    def trimmed(self, alpha: Sequence[float], share: float) -> tuple[Any, dict[str, float]]:
        """That model with the best approximation of rank ⌊share·min(O, I)⌋ of each merged weight, by NumPy's SVD.

        Returns:
            The model, and target → ‖W' - W'_p‖/‖W'‖.
        """
        model = self.oracle(alpha)
        errors: dict[str, float] = {}
        for target in self.members:
            weight_OI = model.get_submodule(target).weight
            u_OK, values_K, v_KI = np.linalg.svd(weight_OI.detach().double().numpy(), full_matrices=False)
            rank = math.floor(share * len(values_K))
            errors[target] = float(np.linalg.norm(values_K[rank:]) / np.linalg.norm(values_K))
            with torch.no_grad():
                weight_OI.copy_(torch.from_numpy(u_OK[:, :rank] * values_K[:rank] @ v_KI[:rank]))
        return model, errors


Maker = Callable[[Any, Path, int], PoolLayout]


def amt(
    *,
    started: bool = True,
    members: int = 4,
    r: int = 3,
    lora_alpha: float = 3,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    **config: Any,
) -> Maker:
    """A pool whose members moved in different directions from one start, or from nothing.

    Args:
        started: trained from the principal part of each weight, as AMT does.
        targets: endings of the linears that are trained.
        config: further keys of adapter_config.json.
    """

    def write(model: Any, folder: Path, seed: int) -> PoolLayout:
        generator = torch.Generator().manual_seed(seed)
        scale = lora_alpha / r
        starts: dict[str, Pair] = {}
        pools: dict[str, list[Pair]] = {}
        for name, module in model.named_modules():
            if name.endswith(tuple(targets)) and type(module) is torch.nn.Linear:
                weight_OI = module.weight.detach().float()
                if started:
                    starts[name] = _principal(weight_OI / scale, r)
                pools[name] = [_trained(weight_OI / scale, starts.get(name), r, generator) for _ in range(members)]
        layout = PoolLayout(folder, model, scale, starts, pools)
        _write(layout, {"r": r, "lora_alpha": lora_alpha, "members": members, **config})
        return layout

    return write


def _product(pair: Pair) -> torch.Tensor:
    a_RI, b_OR = pair
    return b_OR.double() @ a_RI.double()


def _principal(matrix_OI: torch.Tensor, r: int) -> Pair:
    """√Σ Vᵀ and U √Σ of the leading components, float32."""
    u_OK, values_K, v_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    root_R = values_K[:r].sqrt()
    return root_R[:, None] * v_KI[:r], u_OK[:, :r] * root_R


def _trained(matrix_OI: torch.Tensor, start: Pair | None, r: int, generator: torch.Generator) -> Pair:
    """A pair whose product is about CHANGE · ‖W‖/s away from its start."""
    out_width, in_width = matrix_OI.shape
    wanted = CHANGE * float(torch.linalg.vector_norm(matrix_OI))
    step_RI = torch.randn(r, in_width, generator=generator)
    step_OR = torch.randn(out_width, r, generator=generator)
    if start is None:
        return step_RI, step_OR * (wanted / float(torch.linalg.vector_norm(step_OR @ step_RI)))
    a_RI, b_OR = start
    step_RI, step_OR = step_RI * a_RI.square().mean().sqrt(), step_OR * b_OR.square().mean().sqrt()
    size = min(0.5, wanted / float(torch.linalg.vector_norm(step_OR @ a_RI + b_OR @ step_RI)))
    return a_RI + size * step_RI, b_OR + size * step_OR


def _write(layout: PoolLayout, config: Mapping[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for target, pairs in layout.members.items():
        named = {str(place): pair for place, pair in enumerate(pairs)}
        if target in layout.starts:
            named["initial"] = layout.starts[target]
        for label, (a_RI, b_OR) in named.items():
            tensors[f"base_model.model.{target}.lora_A.{label}.weight"] = a_RI.contiguous()
            tensors[f"base_model.model.{target}.lora_B.{label}.weight"] = b_OR.contiguous()
    layout.folder.mkdir(parents=True)
    save_file(tensors, layout.folder / "adapter_model.safetensors")
    whole = {"peft_type": "AMT", "base_model_name_or_path": "base", "task_type": "FEATURE_EXTRACTION", **config}
    (layout.folder / "adapter_config.json").write_text(json.dumps(whole))
