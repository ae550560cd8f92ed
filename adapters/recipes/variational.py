"""A last layer in training: a Gaussian for each class's weights, by the variational bound, or plain weights.

With state φ, weights of class c distributed as N(μ_c, S_c) and noise σ_c, logits have mean m_c = μ_cᵀφ and variance
v_c = max(φᵀS_cφ, 1e-12) + σ_c². What is descended is

    -mean_i (m_y - logsumexp_c (m_c + v_c / 2)) + (KL - wishart) / N
    KL = ½ Σ_c (‖μ_c‖² / s0 + tr S_c / s0 + D log s0 - log det S_c),   s0 = 2 · PRIOR_SCALE / D
    wishart = -(dof + C + 1) Σ_c log σ_c - ½ wishart_scale Σ_c σ_c⁻²

Must not know: adapters, tokens, the loop, how a head answers. `adapters/heads.py` says what the tensors mean.

Shapes: N rows, D width of the state, C classes, R rank.

Source: Harrison, Willes, Snoek: Variational Bayesian Last Layers, https://arxiv.org/abs/2404.11599; the refit is the
Laplace approximation of the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from motet.adapters.heads import Parameterization

PRIOR_SCALE = 10.0
"""vbll's is 1, for means that start at random; ours start at the vocabulary's rows, which are longer than that."""
DOF = 1.0
WISHART_SCALE = 1.0
"""vbll's defaults."""
LEAST_VARIANCE = 1e-12
COVARIANCE_RANK = 3
START_LOG_NOISE = -1.0
START_FACTOR = 1e-3


class SoftmaxHead(nn.Module):
    """Plain weights, by maximum likelihood."""

    parameterization = Parameterization.SOFTMAX

    def __init__(self, mean_CD: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(mean_CD.clone())
        self.bias = nn.Parameter(torch.zeros(len(mean_CD)))

    def means(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The logits [N, C]."""
        return nn.functional.linear(x_ND, self.weight, self.bias)

    def loss(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(self.means(x_ND), y_N)


class VariationalHead(nn.Module):
    """A Gaussian for the weights of each class; parameters named and meant as in the file of a head."""

    def __init__(self, mean_CD: torch.Tensor, parameterization: Parameterization, n_train: int) -> None:
        """Small variances around the means.

        Args:
            n_train: rows that there are to learn from: N of the bound.
        """
        super().__init__()
        classes, width = mean_CD.shape
        self.parameterization, self._n_train = parameterization, n_train
        self.prior_variance = 2 * PRIOR_SCALE / width
        low_rank = parameterization is Parameterization.LOW_RANK
        log_deviation = -math.log(width)
        self.register_buffer("noise_mean", torch.zeros(classes))
        self.noise_logdiag = nn.Parameter(torch.full((classes,), START_LOG_NOISE))
        self.W_mean = nn.Parameter(mean_CD.clone())
        self.W_logdiag = nn.Parameter(torch.full_like(mean_CD, 2 * log_deviation if low_rank else log_deviation))
        if parameterization is Parameterization.DENSE:
            self.W_offdiag = nn.Parameter(torch.zeros(classes, width, width))
        elif low_rank:  # at 0 a factor has no gradient
            self.W_offdiag = nn.Parameter(START_FACTOR / width * torch.randn(classes, width, COVARIANCE_RANK))

    def means(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Of the logits, [N, C]."""
        return x_ND @ self.W_mean.T

    def logits(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each, [N, C]."""
        factor_CDR, spread_CD = self._covariance()
        variance_NC = x_ND.new_zeros(len(x_ND), len(self.W_mean))
        if factor_CDR is not None:
            variance_NC = (x_ND @ factor_CDR).square().sum(-1).T
        if spread_CD is not None:
            variance_NC = variance_NC + x_ND.square() @ spread_CD.T
        noise_C = (2 * self.noise_logdiag).exp()
        return self.means(x_ND), variance_NC.clamp_min(LEAST_VARIANCE) + noise_C

    def loss(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
        """The bound's negative."""
        mean_NC, variance_NC = self.logits(x_ND)
        bound_N = mean_NC.gather(1, y_N[:, None])[:, 0] - (mean_NC + variance_NC / 2).logsumexp(-1)
        return -bound_N.mean() + (self._divergence() - self._noise_prior()) / self._n_train

    @torch.no_grad()
    def refit(self, x_ND: torch.Tensor) -> None:
        """Put the Laplace approximation at the means in the place of a dense covariance.

        Semantics: S_c = (Σ_i p_ic (1 - p_ic) φ_i φ_iᵀ + 1/s0)⁻¹ with p = softmax(m); computed in float64.

        Args:
            x_ND: states of all rows that were learnt from.
        """
        assert self.parameterization is Parameterization.DENSE
        x_ND = x_ND.double()
        p_NC = (x_ND @ self.W_mean.double().T).softmax(-1)
        prior_DD = torch.eye(x_ND.shape[1], dtype=x_ND.dtype) / self.prior_variance
        for number, weight_N in enumerate((p_NC * (1 - p_NC)).T):
            precision_DD = (x_ND * weight_N[:, None]).T @ x_ND + prior_DD
            factor_DD = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision_DD)))
            self.W_offdiag[number] = factor_DD.tril(-1)
            self.W_logdiag[number] = factor_DD.diagonal().log()

    def _covariance(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """S = factor factorᵀ + diag(spread)."""
        if self.parameterization is Parameterization.DIAGONAL:
            return None, (2 * self.W_logdiag).exp()
        if self.parameterization is Parameterization.DENSE:
            return self.W_offdiag.tril(-1) + torch.diag_embed(self.W_logdiag.exp()), None
        return self.W_offdiag, self.W_logdiag.exp()

    def _divergence(self) -> torch.Tensor:
        """KL to the prior but for the constant ½ C D."""
        factor_CDR, spread_CD = self._covariance()
        squares = self.W_mean.square().sum()
        for part in (spread_CD, None if factor_CDR is None else factor_CDR.square()):
            squares = squares if part is None else squares + part.sum()
        log_determinant = self.W_logdiag.sum() * (1 if spread_CD is not None and factor_CDR is not None else 2)
        if spread_CD is not None and factor_CDR is not None:
            inner_CRR = factor_CDR.mT @ (factor_CDR / spread_CD[:, :, None])
            log_determinant = log_determinant + torch.logdet(inner_CRR + torch.eye(inner_CRR.shape[1])).sum()
        return (
            squares / self.prior_variance + self.W_mean.numel() * math.log(self.prior_variance) - log_determinant
        ) / 2

    def _noise_prior(self) -> torch.Tensor:
        log_precision_C = -2 * self.noise_logdiag
        dof = DOF + len(log_precision_C) + 1
        return (dof * log_precision_C.sum() - WISHART_SCALE * log_precision_C.exp().sum()) / 2


def tensors(head: nn.Module) -> Mapping[str, torch.Tensor]:
    """As the file of a head has them."""
    return {name: tensor.detach() for name, tensor in head.state_dict().items()}
