"""PoLAR's folders, written from the paper's formula: ΔW = (alpha/r)·B Θ A, with the fork's configuration and keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.support.layout import Layout
from tests.support.models import ALL_LINEARS

Theta = Literal["identity", "diagonal", "removal"]

FORK_CONFIG: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
"""What PEFT 0.14 writes, of which the authors' fork adds `adapter_name` and `parameterize_S`."""


def polar(
    parameterize: Theta, parametrised: bool, adapter_name: str = "polar", strength: float = 0.12, **options: Any
) -> Callable[[Any, Path, int], Layout]:
    """Factors near orthonormal, as the landing field leaves them, and a free Θ.

    Args:
        parametrised: whether Θ is stored below the name that torch's parametrisation gives it.
        strength: ‖ΔW‖/‖W‖.
    """
    settings = {"r": 4, "lora_alpha": 32, "target_modules": ALL_LINEARS, **options}

    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        config = {**FORK_CONFIG, **settings, "adapter_name": adapter_name, "parameterize_S": parameterize}
        key = "lora_S.parametrizations.weight.original" if parametrised else "lora_S.weight"
        oracle, tensors, deltas = copy.deepcopy(model), {}, {}
        for name, module in oracle.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf not in settings["target_modules"]:
                continue
            rank = settings.get("rank_pattern", {}).get(leaf, settings["r"])
            scale = settings.get("alpha_pattern", {}).get(leaf, settings["lora_alpha"]) / rank
            out_width, in_width = module.weight.shape
            a_RI = _nearly_orthonormal(in_width, rank, generator).T
            b_OR = _nearly_orthonormal(out_width, rank, generator)
            stored_RR = torch.randn(rank, rank, generator=generator)
            if parameterize != "removal":  # there, B A is what it is
                wanted = strength * torch.linalg.vector_norm(module.weight)
                stored_RR *= wanted / (scale * torch.linalg.vector_norm(_effective(stored_RR, parameterize)))
            else:
                b_OR = b_OR * strength
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a_RI.contiguous(), b_OR.contiguous()
            tensors[f"{stem}.{key}"] = stored_RR.contiguous()
            deltas[name] = scale * (b_OR.double() @ _effective(stored_RR, parameterize).double() @ a_RI.double())
            with torch.no_grad():
                module.weight.add_(deltas[name].float())
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return Layout(folder, oracle, "polar", deltas_OI=deltas)

    return write


def _effective(stored_RR: torch.Tensor, parameterize: Theta) -> torch.Tensor:
    if parameterize == "removal":
        return torch.eye(len(stored_RR))
    return torch.diag(torch.diag(stored_RR)) if parameterize == "diagonal" else stored_RR


def _nearly_orthonormal(width: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """[width, rank] with ‖MᵀM - I‖ of some thousandths: training never quite reaches orthonormality."""
    exact, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    return exact + 0.003 * torch.randn(width, rank, generator=generator)
