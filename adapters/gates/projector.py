"""iLoRA's projector: an item's SASRec embedding as an input embedding of the base, in the place of a placeholder token.

    x = W2 gelu(W1 e + b1) + b2        W1 [d, 64], W2 [d, d], GELU with the error function

Must not know: adapters, tokens, prompts. Every tensor is float32 on the CPU.

Source: https://arxiv.org/abs/2312.02445 (LLaRA), whose projector iLoRA keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from motet.adapters.gates.sasrec import WIDTH
from motet.adapters.gates.weights import checked


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    return {
        "mlp_proj.0.weight": (width, WIDTH),
        "mlp_proj.0.bias": (width,),
        "mlp_proj.2.weight": (width, width),
        "mlp_proj.2.bias": (width,),
    }


class Projector:
    """The two linears.

    Args:
        tensors: name → weight, as `shapes` says.
        width: d, of the base's input embeddings.

    Raises:
        FormatError: the tensors are not exactly those.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], width: int) -> None:
        self.width = width
        weights = checked("projector", tensors, shapes(width))
        self._first = weights["mlp_proj.0.weight"], weights["mlp_proj.0.bias"]
        self._second = weights["mlp_proj.2.weight"], weights["mlp_proj.2.bias"]

    def rows(self, items_ND: torch.Tensor) -> torch.Tensor:
        """Input embeddings [n, d] of item embeddings [n, 64]."""
        return F.linear(F.gelu(F.linear(items_ND, *self._first)), *self._second)
