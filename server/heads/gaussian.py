"""A variational Bayesian last layer: from features to independent Gaussian logits.

Must not know: files' bytes, requests, what the labels are. With feature φ, noise deviation σ_c and weights of class c
distributed as N(μ_c, S_c):

    m_c = μ_cᵀφ + b_c        v_c = max(φᵀS_cφ, 1e-12) + σ_c²

`W_logdiag` means three things, which only the declared parameterization tells apart:

    diagonal   ℓ = log standard deviation       φᵀSφ = Σ e^{2ℓ} φ²
    dense      ℓ = log diagonal of L, S = LLᵀ   φᵀSφ = ‖Lᵀφ‖²       L = tril(W_offdiag, -1) + diag(e^ℓ)
    lowrank    ℓ = log variance                 φᵀSφ = ‖Uᵀφ‖² + Σ e^ℓ φ²       U = W_offdiag

Shapes: N features, D their width, C classes, R rank.

Source: vbll 0.4.9, `DiscClassification.logit_predictive`; b is its `noise_mean`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from motet.adapters.heads import Parameterization

LEAST_VARIANCE = 1e-12
"""vbll's own floor under φᵀSφ."""
MOST_CELLS = 1 << 22
"""Values C · N · D that the dense form makes at a time: 16 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class GaussianHead:
    """A head in the dtype and on the device of its tensors; compared by identity.

    Attributes:
        mean_CD: μ.
        bias_C: b.
        noise_C: σ².
        spread_CD: variances e^{2ℓ} or e^ℓ beside the factors; None in the dense form.
        factor_CDR: L or U; None in the diagonal form.
    """

    mean_CD: torch.Tensor
    bias_C: torch.Tensor
    noise_C: torch.Tensor
    spread_CD: torch.Tensor | None
    factor_CDR: torch.Tensor | None

    @classmethod
    def of(cls, parameterization: Parameterization, tensors: Mapping[str, torch.Tensor]) -> GaussianHead:
        """From tensors named as vbll names them, already checked; in their dtype."""
        log_CD = tensors["W_logdiag"]
        spread_CD: torch.Tensor | None = None
        factor_CDR: torch.Tensor | None = None
        if parameterization is Parameterization.DIAGONAL:
            spread_CD = (2 * log_CD).exp()
        elif parameterization is Parameterization.DENSE:
            factor_CDR = tensors["W_offdiag"].tril(-1) + torch.diag_embed(log_CD.exp())
        else:
            assert parameterization is Parameterization.LOW_RANK
            spread_CD, factor_CDR = log_CD.exp(), tensors["W_offdiag"]
        noise_C = (2 * tensors["noise_logdiag"]).exp()
        return cls(tensors["W_mean"], tensors["noise_mean"], noise_C, spread_CD, factor_CDR)

    def logits(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """M [N, C] and v [N, C], in the head's dtype.

        Args:
            x_ND: features on the head's device, any floating dtype.
        """
        assert x_ND.shape[1:] == self.mean_CD.shape[1:]
        x_ND = x_ND.to(self.mean_CD.dtype)
        variance_NC = x_ND.new_zeros(len(x_ND), len(self.mean_CD))
        if self.spread_CD is not None:
            variance_NC += x_ND.square() @ self.spread_CD.T
        if self.factor_CDR is not None:
            classes, _, rank = self.factor_CDR.shape
            size = max(1, MOST_CELLS // (len(x_ND) * rank))
            for start in range(0, classes, size):
                product_CNR = x_ND @ self.factor_CDR[start : start + size]
                variance_NC[:, start : start + size] += product_CNR.square().sum(-1).T
        return x_ND @ self.mean_CD.T + self.bias_C, variance_NC.clamp_min(LEAST_VARIANCE) + self.noise_C
