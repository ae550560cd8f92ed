"""A pool in training: beside each linear of the last layers P pairs, of which the weights α make one adapter.

    y = W_res x + c + s Σ_p α_p B_p A_p x,   W_res = W - s B_0 A_0,   s B_0 A_0 the principal part of W

Every pair starts as (A_0, B_0), so at first every α that sums to 1 is the base.

Must not know: losses, data, files.

Shapes: I/O in and out width of a linear, R rank, P members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

SCALE_CLS = 10.0
"""Of the cosine classifier at first; the authors'."""


class PoolLinear(nn.Module):
    """A frozen linear layer without its principal part, and the pairs that stand in for it."""

    def __init__(self, base: nn.Linear, rank: int, members: int, scale: float) -> None:
        """Take the principal part out of the layer, in place; the sum with any member is what the layer was."""
        super().__init__()
        u_OK, values_K, v_KI = torch.linalg.svd(base.weight.detach().double(), full_matrices=False)
        root_R = (values_K[:rank] / scale).sqrt()
        a_RI, b_OR = root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R
        self.start = a_RI, b_OR = a_RI.float().contiguous(), b_OR.float().contiguous()
        base.weight.data = (base.weight.double() - scale * (b_OR.double() @ a_RI.double())).to(base.weight.dtype)
        self.base_layer, self._scale = base, scale
        self.a_PRI = nn.ParameterList([a_RI.clone() for _ in range(members)])
        self.b_POR = nn.ParameterList([b_OR.clone() for _ in range(members)])
        self.alpha: Sequence[float] = ()
        self.push: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer under α; `push` is added to the factors of every member."""
        y: torch.Tensor = self.base_layer(x)
        for weight, a_RI, b_OR in zip(self.alpha, self.a_PRI, self.b_POR, strict=True):
            if weight:
                if self.push is not None:
                    a_RI, b_OR = a_RI + self.push[0], b_OR + self.push[1]
                y = y + linear(linear(x, a_RI) * (weight * self._scale), b_OR)
        return y


class PoolNetwork(nn.Module):
    """All linears of a pool, which one α rules, and the scale of its classifier."""

    def __init__(self, linears: Mapping[str, PoolLinear], members: int) -> None:
        """The first member alone.

        Args:
            linears: by their paths in the model.
        """
        super().__init__()
        self.linears, self.members = dict(linears), members  # a plain dict: the model owns them already
        self.scale_cls = nn.Parameter(torch.tensor(SCALE_CLS))
        self.alone(0)

    def mix(self, alpha: Sequence[float]) -> None:
        """Compute with the weights α [P] from now on."""
        assert len(alpha) == self.members, alpha
        for module in self.linears.values():
            module.alpha = tuple(alpha)

    def alone(self, member: int) -> None:
        """Compute with one member from now on."""
        self.mix([float(member == place) for place in range(self.members)])

    def factors(self, member: int) -> list[nn.Parameter]:
        """A and B of each linear in turn."""
        return [part for module in self.linears.values() for part in (module.a_PRI[member], module.b_POR[member])]

    def push(self, member: int, gradients: Sequence[torch.Tensor], share: float) -> None:
        """Move each factor of a member by `share` of its own size along its gradient, until `release`."""
        moves = []
        for factor, gradient in zip(self.factors(member), gradients, strict=True):
            size = torch.linalg.vector_norm(gradient)
            moves.append(share * torch.linalg.vector_norm(factor.detach()) * gradient / size.clamp_min(1e-12))
        for place, module in enumerate(self.linears.values()):
            module.push = moves[2 * place], moves[2 * place + 1]

    def release(self) -> None:
        """Undo `push`; what was computed with it keeps its gradients."""
        for module in self.linears.values():
            module.push = None


def put_into(model: Any, targets: Sequence[str], top: int, rank: int, alpha: int, members: int) -> PoolNetwork:
    """Replace the targets of the last `top` layers of a causal language model; nothing else of it trains."""
    model.requires_grad_(False)
    linears: dict[str, PoolLinear] = {}
    count = len(model.model.layers)
    for number in range(count - top, count):
        prefix = f"model.layers.{number}"
        for path, module in list(model.get_submodule(prefix).named_modules()):
            parent, _, leaf = f"{prefix}.{path}".rpartition(".")
            if isinstance(module, nn.Linear) and leaf in targets:
                linears[f"{prefix}.{path}"] = PoolLinear(module, rank, members, alpha / rank)
                setattr(model.get_submodule(parent), leaf, linears[f"{prefix}.{path}"])
    network = PoolNetwork(linears, members)
    model.add_module("pool", network)
    return network
