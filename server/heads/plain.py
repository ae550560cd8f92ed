"""A plain linear head: its logits are certain, so that nothing of their entropy is epistemic.

Must not know: files' bytes, requests, what the labels are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxHead:
    """Compared by identity.

    Attributes:
        weight_CD: [C, D].
        bias_C: [C].
    """

    weight_CD: torch.Tensor
    bias_C: torch.Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> SoftmaxHead:
        """From the tensors of a head file, already checked."""
        return cls(tensors["weight"], tensors["bias"])

    def logits(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[N, C] in the head's dtype, and no variance."""
        assert x_ND.shape[1:] == self.weight_CD.shape[1:]
        return x_ND.to(self.weight_CD.dtype) @ self.weight_CD.T + self.bias_C, None
