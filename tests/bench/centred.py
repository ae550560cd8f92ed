"""How far bfloat16 operands miss the change an adapter of a residual model makes: stacked naively, and centred.

A random base of one linear, PiSSA's start, a random change of several sizes. Run it from the repository root:

    python -m tests.bench.centred --out docs/results/centred-bf16.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from motet.adapters.effects import LowRank
from motet.adapters.methods.centred import centred
from tests.bench.lines import append, surroundings

WIDTH, RANK, ROWS, SEED = 576, 16, 256, 0
"""Of the linear, of the adapter, of the inputs the error is averaged over."""
CHANGES = (0.25, 0.08, 0.025, 0.0083, 0.0025)
"""‖ΔW‖/‖W‖ to first order; official runs lie between the first and the last."""


@dataclass(frozen=True)
class Errors:
    """‖error of ΔW x‖ / ‖ΔW x‖ over random inputs x, for one size of the change.

    Attributes:
        change: ‖ΔW‖/‖W‖.
        stacked: operands [A; A0] and s·[B, -B0] rounded to bfloat16.
        centred: operands [A; A - A0] and s·[B - B0, B0] rounded to bfloat16.
        residual: W - s·B0 A0 rounded to bfloat16, as a trainer in bfloat16 holds it; A and B exact.
    """

    change: float
    stacked: float
    centred: float
    residual: float


def measure(changes: Sequence[float] = CHANGES, width: int = WIDTH, rank: int = RANK, seed: int = SEED) -> list[Errors]:
    """One row of errors for each size of the change."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(width, width, generator=generator)
    u_OK, s_K, vt_KI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    root_R = s_K[:rank].sqrt()
    b0_OR, a0_RI = (u_OK[:, :rank] * root_R).float(), (root_R[:, None] * vt_KI[:rank]).float()
    step_OR, step_RI = (torch.randn(factor.shape, generator=generator) for factor in (b0_OR, a0_RI))
    moved_OI = step_OR @ a0_RI + b0_OR @ step_RI
    unit = float(torch.linalg.vector_norm(weight_OI) / torch.linalg.vector_norm(moved_OI))
    x_IT = torch.randn(width, ROWS, generator=generator).double()
    return [
        _errors(weight_OI, LowRank(a0_RI, b0_OR), LowRank(a0_RI + by * step_RI, b0_OR + by * step_OR), x_IT)
        for by in (change * unit for change in changes)
    ]


def _errors(weight_OI: torch.Tensor, start: LowRank, trained: LowRank, x_IT: torch.Tensor) -> Errors:
    exact_OI = _product(trained) - _product(start)
    stack = LowRank(torch.cat([trained.a_RI, start.a_RI]), torch.cat([trained.b_OR, -start.b_OR], 1))
    residual_OI = weight_OI.double() - _product(start)
    rounded_OI = residual_OI.bfloat16().double()

    def error(found_OI: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm((found_OI - exact_OI) @ x_IT) / torch.linalg.vector_norm(exact_OI @ x_IT))

    return Errors(
        change=float(torch.linalg.vector_norm(exact_OI) / torch.linalg.vector_norm(weight_OI)),
        stacked=error(_product(_rounded(stack))),
        centred=error(_product(_rounded(centred(trained, start)))),
        residual=error(rounded_OI + _product(trained) - weight_OI.double()),
    )


def _product(pair: LowRank) -> torch.Tensor:
    return pair.b_OR.double() @ pair.a_RI.double()


def _rounded(pair: LowRank) -> LowRank:
    return LowRank(pair.a_RI.bfloat16(), pair.b_OR.bfloat16())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    line = {
        **surroundings("torch"),
        "arguments": {"width": WIDTH, "rank": RANK, "rows": ROWS, "seed": SEED},
        "results": [asdict(errors) for errors in measure()],
    }
    append(options.out, line)
    print("‖ΔW‖/‖W‖   stacked   centred   W_res")
    for errors in measure():
        print(f"{errors.change:9.2%}{errors.stacked:10.1e}{errors.centred:10.1e}{errors.residual:9.1e}")


if __name__ == "__main__":
    main()
