"""PoLAR: ΔW = (alpha/r)·B S A with nearly orthonormal A and B; the landing field keeps them so without retractions.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2506.03133; the layout is that of the
authors' PEFT, `lora_S` with the name that its parametrisation gives it.

Shapes: I/O in and out width of the target, R rank, T rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import linear

from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes.folder import peft_config, write
from motet.adapters.recipes.trainee import Setup, Trainee

INFEASIBILITY_PENALTY = 5e-3
"""The authors' lambda: how strongly a factor is drawn to orthonormal columns."""


class PolarLinear(nn.Module):
    """A linear layer with a PoLAR triple beside it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        """Random orthonormal factors, S = 0."""
        super().__init__()
        self.base_layer, self.scale = base, alpha / rank
        self.a_RI = nn.Parameter(_orthonormal_columns(base.in_features, rank).T.contiguous())
        self.s_RR = nn.Parameter(torch.zeros(rank, rank))
        self.b_OR = nn.Parameter(_orthonormal_columns(base.out_features, rank))

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """W x + c + (alpha/r)·B S A x."""
        y_TO: torch.Tensor = self.base_layer(x_TI)
        return y_TO + self.scale * linear(linear(linear(x_TI, self.a_RI), self.s_RR), self.b_OR)

    def tensors(self, path: str) -> dict[str, nn.Parameter]:
        """The triple by the names of its file."""
        stem = f"{PREFIX}{path}.lora_"
        return {
            f"{stem}A.weight": self.a_RI,
            f"{stem}B.weight": self.b_OR,
            f"{stem}S.parametrizations.weight.original": self.s_RR,
        }


def landing_field(gradient_NR: torch.Tensor, factor_NR: torch.Tensor) -> torch.Tensor:
    """The direction that replaces a tall factor's gradient G.

    G MᵀM - M GᵀM + lambda·M (MᵀM - 1): the first two terms are the Riemannian gradient, times M, for orthonormal M.
    """
    gram_RR = factor_NR.T @ factor_NR
    tangent_NR = gradient_NR @ gram_RR - factor_NR @ (gradient_NR.T @ factor_NR)
    return tangent_NR + INFEASIBILITY_PENALTY * factor_NR @ (gram_RR - torch.eye(len(gram_RR)))


def start(setup: Setup) -> Trainee:
    """Put a triple beside every target; the rank is below both widths of each."""
    layers: dict[str, PolarLinear] = {}
    setup.model.requires_grad_(False)
    for path, module in list(setup.model.named_modules()):
        parent, _, name = path.rpartition(".")
        if not isinstance(module, nn.Linear) or name not in setup.targets:
            continue
        layers[path] = PolarLinear(module, setup.rank, setup.alpha)
        setattr(setup.model.get_submodule(parent), name, layers[path])
    trainable = {name: tensor for path, layer in layers.items() for name, tensor in layer.tensors(path).items()}

    @torch.no_grad()
    def correct_gradients() -> None:
        for layer in layers.values():
            a_grad, b_grad = layer.a_RI.grad, layer.b_OR.grad
            assert a_grad is not None
            assert b_grad is not None
            a_grad.copy_(landing_field(a_grad.T, layer.a_RI.T).T)
            b_grad.copy_(landing_field(b_grad, layer.b_OR))

    def save(folder: Path) -> None:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=setup.rank,
            lora_alpha=setup.alpha,
            target_modules=list(setup.targets),
        )
        own = {"adapter_name": "polar", "parameterize_S": "identity"}
        dtype = getattr(torch, setup.recipe.saved_dtype)
        write(folder, trainable, {**peft_config(config, setup.base_name), **own}, dtype)

    return Trainee(setup.model, trainable, save, correct_gradients)


def _orthonormal_columns(n: int, rank: int) -> torch.Tensor:
    q_NR: torch.Tensor = torch.linalg.qr(torch.randn(n, rank)).Q
    return q_NR.contiguous()
