"""CorDA's folders: PEFT's, the SVD cache, and the authors' own architecture, which PEFT does not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import save_file
from torch import nn

from motet.adapters.convert.corda_cache import corda_cache as convert
from tests.support.layout import CHANGE, Layout, read_back
from tests.support.layouts_peft import calibration
from tests.support.layouts_residual import Trained, beside_residual, configured, save_converted, train

Maker = Callable[[Any, Path, int], Layout]
Variant = Literal["ipm", "kpm"]


def _trained(
    model: Any, seed: int, variant: Variant, initial: Path, cache_file: Path | None = None, **options: Any
) -> tuple[Trained, LoraConfig]:
    """PEFT's calibration, one sample at a time as the method asks, then PEFT's initial adapter, then "training"."""
    settings = CordaConfig(corda_method=variant, cache_file=cache_file and str(cache_file), verbose=False)
    config = configured(init_lora_weights="corda", corda_config=settings, **options)

    def calibrate(changed: Any) -> None:
        def run() -> None:
            for batch in calibration(seed, batches=24, batch=1):
                changed(**batch)

        preprocess_corda(changed, config, run_model=run)

    return train(model, config, seed, initial=initial, prepared=calibrate), config


def corda_native(variant: Variant) -> Maker:
    """`init_lora_weights: corda` with the initial adapter in a sub-folder; PEFT cannot load it on a fresh base."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained, _ = _trained(model, seed, variant, folder / "corda_init")
        trained.peft_model.save_pretrained(folder)
        return Layout(folder, _oracle(trained, folder), "corda", deltas_OI=trained.deltas_OI)

    return write


def _oracle(trained: Trained, folder: Path) -> Any:
    return read_back(copy.deepcopy(trained.peft_model).unload(), folder, init_lora_weights=True, corda_config=None)


def corda_residual(given: Literal["initial", "residual"], method: str) -> Maker:
    """The residual model and the adapter whose configuration says `true`, as PEFT's CorDA example writes them."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained, config = _trained(model, seed, "ipm", folder / "corda_init", use_rslora=True)
        config.corda_config = None
        return beside_residual(trained, folder, given, method, folder / "corda_init")

    return write


def corda_converted() -> Maker:
    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained, config = _trained(model, seed, "kpm", folder / "start")
        config.corda_config = None
        return save_converted(trained, model, folder / "converted", folder / "start")

    return write


def corda_cache() -> Maker:
    """The adapter and PEFT's cache of the SVD, brought together by the offline converter."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        cache_file = folder / "cache" / "eigens.pt"
        trained, _ = _trained(model, seed, "kpm", folder / "start", cache_file, rank_pattern={"up_proj": 3})
        trained.peft_model.save_pretrained(folder / "adapter")
        convert(cache_file, folder / "adapter", folder / "converted")
        oracle = _oracle(trained, folder / "adapter")
        return Layout(folder / "converted", oracle, "corda", deltas_OI=trained.deltas_OI)

    return write


class CovSvdLinear(nn.Module):
    """The authors' layer as their paper draws it: x → BLinear → ALinear, plus the frozen residual."""

    def __init__(self, a_OR: torch.Tensor, b_RI: torch.Tensor, residual_OI: torch.Tensor, bias_O: Any) -> None:
        super().__init__()
        self.ALinear = nn.Linear(a_OR.shape[1], a_OR.shape[0], bias=bias_O is not None)
        self.BLinear = nn.Linear(b_RI.shape[1], b_RI.shape[0], bias=False)
        self.ALinear.weight, self.BLinear.weight = nn.Parameter(a_OR), nn.Parameter(b_RI)
        self.weight_residual = nn.Parameter(residual_OI)
        if bias_O is not None:
            self.ALinear.bias = nn.Parameter(bias_O.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.ALinear(self.BLinear(x)) + nn.functional.linear(x, self.weight_residual)
        return out


def corda_official(dtype: torch.dtype = torch.float32, rank: int = 4) -> Maker:
    """A model directory of the architecture CovSVDLlamaForCausalLM, with code that must never run.

    Args:
        dtype: what everything is rounded to when it is written; the oracle computes with what was written.
    """

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        oracle, deltas = copy.deepcopy(model), {}
        head = oracle.get_output_embeddings()
        for name, linear in list(oracle.named_modules()):
            if not isinstance(linear, nn.Linear) or linear is head:
                continue
            weight_OI = linear.weight.detach()
            b0_OR, a0_RI = _oriented(weight_OI, rank, generator)
            residual_OI = weight_OI - b0_OR @ a0_RI
            step_OR, step_RI = (torch.randn(factor.shape, generator=generator) for factor in (b0_OR, a0_RI))
            moved_OI = step_OR @ a0_RI + b0_OR @ step_RI
            size = CHANGE * torch.linalg.vector_norm(weight_OI) / torch.linalg.vector_norm(moved_OI)
            b_OR, a_RI = b0_OR + size * step_OR, a0_RI + size * step_RI
            deltas[name] = b_OR.double() @ a_RI.double() - b0_OR.double() @ a0_RI.double()
            parent, _, leaf = name.rpartition(".")
            setattr(oracle.get_submodule(parent), leaf, CovSvdLinear(b_OR, a_RI, residual_OI, linear.bias))
        oracle.to(dtype)
        folder.mkdir(parents=True)
        _save_official(oracle, folder, rank)
        return Layout(folder, oracle.float(), "corda", deltas_OI=deltas)

    return write


def _oriented(weight_OI: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """First components of W, oriented by a covariance C: SVD(W C) = U S Vᵀ, W = U S (Vᵀ C⁻¹)."""
    x_TI = torch.randn(400, weight_OI.shape[1], generator=generator)
    covariance_II = x_TI.T @ x_TI / 400
    u_OK, s_K, vt_KI = torch.linalg.svd(weight_OI @ covariance_II, full_matrices=False)
    root_R = s_K[:rank].sqrt()
    return u_OK[:, :rank] * root_R, root_R[:, None] * (vt_KI[:rank] @ torch.linalg.inv(covariance_II))


def _save_official(oracle: Any, folder: Path, rank: int) -> None:
    config = {
        **oracle.config.to_dict(),
        "architectures": ["CovSVDLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_oursvd_llama.CovSVDLlamaConfig",
            "AutoModelForCausalLM": "modeling_oursvd_llama.CovSVDLlamaForCausalLM",
        },
        "lora_r": rank,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    for module in ("configuration_oursvd_llama", "modeling_oursvd_llama"):
        (folder / f"{module}.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    tied = oracle.config.tie_word_embeddings
    tensors = {
        name: tensor.contiguous()
        for name, tensor in oracle.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
