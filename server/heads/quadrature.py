"""The integrals behind the softmax of independent Gaussian logits, to the last digits of float64.

Must not know: heads, features, labels. With z_j ~ N(m_j, s_j²) and Gumbel noise g_j, softmax(z) is the distribution of
argmax (z_j + g_j), and E[softmax_k(z)] the probability that z_k + g_k is the largest:

    P_k = ∫ f_k(t) ∏_{j≠k} F_j(t) dt        F_j, f_j: distribution and density of z_j + g_j
    R_k = ∫ r_k(t) ∏_{j≠k} F_j(t) dt        r_k: density of z_k + g_k times the mean of g_k there

Σ_k R_k is the mean Gumbel noise of the winner. Given z it exceeds its own mean γ by the entropy of softmax(z), so that
E[H(softmax(z))] = Σ_k R_k - γ.

Every sum is a trapezoidal one of an analytic integrand that dies at both ends, hence converges exponentially. Outside,
nothing matters below t0 = max (m - 8s - 4), where one factor is 0 already; above it, what still varies at t varies
over a width that grows with t - t0, so that t = t0 + 24 sinh(u / 24) with uniform u serves widths from 0 to 1e19 at
once. Inside, narrow classes (s ≤ ½) are averaged over the Gaussian, the others over the Gumbel noise: each average has
the same nodes for every s.

Shapes: K classes of all requests in a row, N requests, T outer nodes, E inner nodes.

Source: the Gumbel-max trick; ours are the split of the inner average and the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

EULER_GAMMA = 0.5772156649015329
NARROW = 0.5
"""Largest standard deviation that is averaged over the Gaussian."""
TAIL_SD = 8.0
"""A Gaussian is within so many standard deviations but for 1e-15."""
LOW_GUMBEL, HIGH_GUMBEL = 4.0, 37.0
"""Gumbel noise lies between -4 and 37 but for 1e-16."""
STEP, BEND = 0.3, 24.0
"""Of the outer grid: the step of u, and the distance from which on t grows exponentially with u."""
GAUSSIAN_STEP, GAUSSIAN_REACH = 0.5, 8.5
GUMBEL_STEP, GUMBEL_BEND = 0.25, 6.0
INNER_CELLS = 1 << 15
"""Values of an inner grid made at a time: they stay in the cache of a core."""
LEAST = 1e-40
"""In place of an F that is 0 but for the rounding of 1 + erf; any other such number gives the same integrals."""
FAR = 25.0
"""exp of its square is nearly the largest number, and erf of it 1; further out the processor slows down tenfold."""
SEEN_AS_ZERO = -1000.0
"""exp of it is 0; what lies further below t0 than that may as well lie there."""


def outer_nodes(mean_K: torch.Tensor, variance_K: torch.Tensor, request_K: torch.Tensor, n: int) -> torch.Tensor:
    """[N] how many outer nodes each request needs; grows with the logarithm of its largest standard deviation."""
    low_N, high_N = _range(mean_K, variance_K.sqrt(), request_K, n)
    return ((torch.asinh((high_N - low_N) / BEND) * (BEND / STEP)).ceil() + 1).long()


def integrate(
    mean_K: torch.Tensor, variance_K: torch.Tensor, request_K: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """P for every class, and the mean entropy of every request.

    Args:
        mean_K, variance_K: float64 on the CPU, finite, variances at least 0.
        request_K: int64 below n, the request that a class belongs to.

    Returns:
        p_K and aleatoric_N (nats), float64, off by less than 1e-11 and, up to C = 1000, 1e-10; neither is clipped or
        normalised.
    """
    deviation_K = variance_K.sqrt()
    low_N, high_N = _range(mean_K, deviation_K, request_K, n)
    span = float((high_N - low_N).max())
    u_T = torch.arange(0, math.asinh(span / BEND) * BEND + STEP, STEP, dtype=torch.float64)
    x_T = BEND * torch.sinh(u_T / BEND)
    width_T = STEP * torch.cosh(u_T / BEND)
    place_K = mean_K - low_N[request_K]
    ffr_KT3 = mean_K.new_empty(len(mean_K), len(x_T), 3)
    for average, chosen_K in ((_over_gaussian, deviation_K <= NARROW), (_over_gumbel, deviation_K > NARROW)):
        if len(index_Q := chosen_K.nonzero()[:, 0]):
            ffr_KT3[index_Q] = average(x_T, place_K[index_Q], deviation_K[index_Q])
    cumulative_KT, density_KT, noise_KT = ffr_KT3.unbind(-1)
    # No F is 0: at t0 each is above 1e-40. The product of a thousand can be, and then its logarithm is what counts.
    log_product_NT = mean_K.new_zeros(n, len(x_T)).index_add_(0, request_K, cumulative_KT.log())
    others_KT = (log_product_NT.exp_() * width_T)[request_K] / cumulative_KT
    p_K = (density_KT * others_KT).sum(-1)
    noise_K = (noise_KT * others_KT).sum(-1)
    return p_K, mean_K.new_zeros(n).index_add_(0, request_K, noise_K) - EULER_GAMMA


def _range(
    mean_K: torch.Tensor, deviation_K: torch.Tensor, request_K: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N], [N]: where the largest z + g of each request lies, but for 1e-15."""
    low_N, high_N = (
        mean_K.new_full((n,), -math.inf).scatter_reduce_(0, request_K, ends_K, "amax")
        for ends_K in (mean_K - TAIL_SD * deviation_K - LOW_GUMBEL, mean_K + TAIL_SD * deviation_K + HIGH_GUMBEL)
    )
    return low_N, high_N + request_K.bincount(minlength=n).log()


def _over_gaussian(x_T: torch.Tensor, place_Q: torch.Tensor, deviation_Q: torch.Tensor) -> torch.Tensor:
    """[Q, T, 3] F, f and r of m + s ε + g at t0 + x, as means over ε of those of the Gumbel noise t - m - s ε."""
    reach = round(GAUSSIAN_REACH / GAUSSIAN_STEP)
    epsilon_E = torch.arange(-reach, reach + 1, dtype=torch.float64) * GAUSSIAN_STEP
    weight_E = torch.softmax(epsilon_E.square() / -2, -1)
    # With a = (t - m) - s ε, e^-a is a product of one factor for each.
    factor_QE = torch.exp(deviation_Q[:, None] * epsilon_E)
    weights_QE3 = torch.stack(
        [weight_E.expand_as(factor_QE), weight_E * factor_QE, weight_E * factor_QE * epsilon_E], -1
    )
    y_QT = x_T - place_Q[:, None].clamp_min(SEEN_AS_ZERO)
    e_QT = torch.exp(-y_QT)
    mean_QT3 = x_T.new_empty(len(place_Q), len(x_T), 3)
    for part, inner_QTE in _inner(len(place_Q), len(x_T), len(epsilon_E)):
        torch.mul(e_QT[part, :, None], -factor_QE[part, None, :], out=inner_QTE)
        torch.bmm(inner_QTE.exp_(), weights_QE3[part], out=mean_QT3[part])
    density_QT = e_QT * mean_QT3[:, :, 1]
    noise_QT = y_QT * density_QT - deviation_Q[:, None] * e_QT * mean_QT3[:, :, 2]
    return torch.stack([mean_QT3[:, :, 0], density_QT, noise_QT], -1)


def _over_gumbel(x_T: torch.Tensor, place_Q: torch.Tensor, deviation_Q: torch.Tensor) -> torch.Tensor:
    """The same as means over g of the Gaussian's distribution and density at (t - m - g) / s."""
    high = math.asinh((LOW_GUMBEL + HIGH_GUMBEL) / GUMBEL_BEND) * GUMBEL_BEND
    u_E = torch.arange(0, high + GUMBEL_STEP, GUMBEL_STEP, dtype=torch.float64)
    g_E = GUMBEL_BEND * torch.sinh(u_E / GUMBEL_BEND) - LOW_GUMBEL
    weight_E = GUMBEL_STEP * torch.cosh(u_E / GUMBEL_BEND) * torch.exp(-g_E - torch.exp(-g_E))
    noise_weight_E = weight_E * g_E
    root_Q = deviation_Q * math.sqrt(2)
    y_QT = (x_T - place_Q[:, None]) / root_Q[:, None]
    shift_QE = g_E / root_Q[:, None]
    mean_QT3 = x_T.new_empty(len(place_Q), len(x_T), 3)
    for part, inner_QTE in _inner(len(place_Q), len(x_T), len(g_E)):
        torch.sub(y_QT[part, :, None], shift_QE[part, None, :], out=inner_QTE)
        bell_QTE = inner_QTE.clamp_(-FAR, FAR).square().neg_().exp_()
        mean_QT3[part, :, 1] = bell_QTE @ weight_E
        mean_QT3[part, :, 2] = bell_QTE @ noise_weight_E
        mean_QT3[part, :, 0] = inner_QTE.erf_() @ weight_E
    mean_QT3[:, :, 0].add_(1).div_(2).clamp_min_(LEAST)
    mean_QT3[:, :, 1:].div_(root_Q[:, None, None] * math.sqrt(math.pi))
    return mean_QT3


def _inner(n_rows: int, outer: int, inner: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of the rows, each with a [rows, T, E] to compute in: one buffer for all, as fresh memory costs more."""
    size = min(n_rows, max(1, INNER_CELLS // (outer * inner)))
    buffer_QTE = torch.empty(size, outer, inner, dtype=torch.float64)
    for start in range(0, n_rows, size):
        stop = min(start + size, n_rows)
        yield slice(start, stop), buffer_QTE[: stop - start]
