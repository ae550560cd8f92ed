"""The leading singular components of a matrix as a low-rank pair, and what they leave.

Must not know: methods, files. Computed from the Gram matrix of the smaller side, in float64: a difference of two models
is known to float32, and its small components must not drown in the rounding of a float32 SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from motet.adapters.effects import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Leading:
    """The components of the largest singular values.

    Attributes:
        pair: A = √Σ Vᵀ and B = U √Σ, float64.
        rest: ‖M - B A‖ (Frobenius).
    """

    pair: LowRank
    rest: float


def leading(matrix_OI: torch.Tensor, rank: int) -> Leading:
    """The `rank` leading components of a matrix; zero beyond its number of rows or columns."""
    m_OI = matrix_OI.double()
    wide = m_OI.shape[0] <= m_OI.shape[1]
    small_MN = m_OI if wide else m_OI.T
    squares_M, vectors_MM = torch.linalg.eigh(small_MN @ small_MN.T)
    beyond = max(0, rank - len(squares_M))
    values_M = F.pad(squares_M.clamp(min=0).sqrt().flip(0), (0, beyond))
    left_MR = F.pad(vectors_MM.flip(1)[:, :rank], (0, beyond))
    right_RN = left_MR.T @ small_MN
    root_R = values_M[:rank].sqrt()
    inverse_R = torch.where(root_R > 0, 1 / root_R, 0)
    scaled_MR, scaled_RN = left_MR * root_R, right_RN * inverse_R[:, None]
    pair = LowRank(scaled_RN, scaled_MR) if wide else LowRank(scaled_MR.T, scaled_RN.T)
    return Leading(pair, float(torch.linalg.vector_norm(m_OI - pair.b_OR @ pair.a_RI)))
