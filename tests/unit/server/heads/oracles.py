"""Independent ways to the same numbers: the formula on a plain grid in NumPy, and vbll itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import expit
from vbll import DiscClassification

from motet.server.heads.predictive import Logits

KINDS = ["dense", "diagonal", "lowrank"]


def plain_grid(m: np.ndarray, v: np.ndarray, finer: int = 1) -> tuple[np.ndarray, float]:
    """P and aleatoric entropy on the uniform grids of the formula as it is written, averaged over ε for every s.

    Args:
        finer: divides every step.
    """
    s = np.sqrt(v)
    outer = np.arange((m - 7 * s).min() - 4, (m + 7 * s).max() + 24, 0.08 / finer)
    f, cumulative, g = np.empty((3, len(m), len(outer)))
    for k in range(len(m)):
        step = min(0.25, 0.5 / s[k] if s[k] else 0.25) / finer
        epsilon = np.arange(-8, 8 + step / 2, step)
        weight = np.exp(-(epsilon**2) / 2)
        weight /= weight.sum()
        a = np.maximum(outer[:, None] - m[k] - s[k] * epsilon, -30)
        gumbel = np.exp(-np.exp(-a))
        cumulative[k] = gumbel @ weight
        f[k] = (np.exp(-a) * gumbel) @ weight
        g[k] = ((m[k] + s[k] * epsilon) * np.exp(-a) * gumbel) @ weight
    others = np.stack([np.delete(cumulative, k, 0).prod(0) for k in range(len(m))])
    step = 0.08 / finer
    p = step * (f * others).sum(1)
    aleatoric = step * (outer * f * others).sum() - np.euler_gamma - step * (g * others).sum()
    return p, float(aleatoric)


def sigmoid_mean(mean: float, variance: float) -> float:
    """E[σ(δ)] of δ ~ N(mean, variance), by adaptive quadrature."""
    s = np.sqrt(variance)
    points = sorted({float(np.clip(-mean / s, -9, 9)), 0.0})
    value, _ = quad(
        lambda e: expit(mean + s * e) * np.exp(-e * e / 2) / np.sqrt(2 * np.pi),
        -10,
        10,
        points=points,
        epsabs=1e-13,
        epsrel=1e-13,
        limit=500,
    )
    return float(value)


def layer(kind: str, seed: int, classes: int = 5, width: int = 12, spread: float = 1.0) -> Any:
    """A vbll layer of random parameters, in float64; its covariance is neither small nor diagonal."""
    generator = torch.Generator().manual_seed(seed)
    made = DiscClassification(width, classes, 0.01, parameterization=kind, cov_rank=3)
    state = {
        name: spread * torch.randn(tensor.shape, generator=generator) * (0.3 if "offdiag" in name else 0.7)
        for name, tensor in made.state_dict().items()
    }
    made.load_state_dict(state)
    return made.double().eval()


def draw(classes: int, seed: int, mean: float = 2.0, variance: float = 1.0) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    mean_C = mean * torch.randn(classes, generator=generator, dtype=torch.float64)
    return Logits(mean_C, variance * torch.rand(classes, generator=generator, dtype=torch.float64))
