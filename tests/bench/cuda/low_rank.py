"""The low-rank product by Triton against a loop over adapters and a padded batched product, and its tiles.

Shapes: T batch rows, I/O a target's in/out widths, R the largest rank.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from motet.kernels.dispatch import low_rank_plan
from tests.bench.cuda.timing import Work, dtype_of, milliseconds, repeated
from tests.support.low_rank import Case, Run, make_case

_REPEATS = 20


@dataclass(frozen=True)
class Product:
    """One target and batch.

    Attributes:
        widths: in and out of the target.
        times_ms: way → median of one product.
        bytes_read: every live adapter's operands once, x once, y twice.
        of_bound: share of a plain copy's bytes per second.
    """

    widths: tuple[int, int]
    rows: int
    adapters: int
    rank: int
    times_ms: dict[str, float]
    bytes_read: int
    of_bound: float


@dataclass(frozen=True)
class Tiles:
    """One choice of tiles; the kernels choose by rows of a segment."""

    rows: int
    in_block: int
    out_block: int
    took_ms: float


@torch.inference_mode()
def product(
    widths: tuple[int, int], rows: int, adapters: int, rank: int, device: torch.device, bound: float, rounds: int
) -> Product:
    """The three ways in one run; their results are compared first.

    Args:
        bound: bytes per second of a plain copy.
    """
    case = _case(widths, rows, adapters, rank, device)
    ways = {"triton": _triton(case), "loop": _loop(case), "padded": _padded(case, rank)}
    results = {name: way() for name, way in ways.items()}
    for name in ("loop", "padded"):
        torch.testing.assert_close(results["triton"], results[name], rtol=2**-5, atol=2**-5)  # bfloat16 sums
    times_ms = {
        name: took_ms / _REPEATS
        for name, took_ms in milliseconds(
            {name: repeated(way, _REPEATS, device) for name, way in ways.items()}, device, rounds
        ).items()
    }
    live = min(adapters, rows)
    bytes_read = case.arena_NU.itemsize * (live * rank * sum(widths) + rows * widths[0] + 2 * rows * widths[1])
    of_bound = bytes_read / (times_ms["triton"] / 1000) / bound
    return Product(widths, rows, adapters, rank, times_ms, bytes_read, of_bound)


@torch.inference_mode()
def tiles(
    widths: tuple[int, int],
    rows: int,
    adapters: int,
    rank: int,
    device: torch.device,
    choices: Sequence[tuple[int, int, int]],
    rounds: int,
) -> list[Tiles]:
    """Every choice, the fastest first."""
    case = _case(widths, rows, adapters, rank, device)
    works = {}
    for choice in choices:
        with _tiled(*choice):
            works[choice] = repeated(_triton(case, choice), _REPEATS, device)
    took_ms = milliseconds({str(choice): work for choice, work in works.items()}, device, rounds)
    return sorted((Tiles(*choice, took_ms[str(choice)] / _REPEATS) for choice in choices), key=lambda one: one.took_ms)


def all_choices() -> list[tuple[int, int, int]]:
    return list(itertools.product((16, 32, 64, 128), (32, 64, 128), (64, 128, 256)))


@contextlib.contextmanager
def _tiled(rows: int, in_block: int, out_block: int) -> Iterator[None]:
    plan = "motet.kernels.triton.plan"
    with (
        mock.patch(f"{plan}.tile_rows", return_value=rows),
        mock.patch(f"{plan}._IN_BLOCK", in_block),
        mock.patch(f"{plan}._OUT_BLOCK", out_block),
    ):
        yield


def _case(widths: tuple[int, int], rows: int, adapters: int, rank: int, device: torch.device) -> Case:
    """Rows dealt to the adapters in runs of one length."""
    live = min(adapters, rows)
    counts = [rows // live + (index < rows % live) for index in range(live)]
    runs = [Run(adapter, count) for adapter, count in enumerate(counts)]
    return make_case(runs, [[rank]] * live, [widths], unit=16, dtype=dtype_of(device), device=str(device))


def _triton(case: Case, choice: tuple[int, int, int] | None = None) -> Work:
    plan = low_rank_plan("triton", case.arena_NU, case.shapes, case.segments, case.n_rows)
    assert plan.backend == "triton"
    x_TI, out_TO = case.x_TI[0], case.y_TO[0].clone()

    def once() -> torch.Tensor:
        out_TO.copy_(case.y_TO[0])
        with contextlib.nullcontext() if choice is None else _tiled(*choice):
            plan.add_(0, out_TO, x_TI)
        return out_TO

    return once


def _operands(case: Case) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows, A [R, I] and Bᵀ [R, O] of every segment, copied out of the arena."""
    flat, unit, segments = case.arena_NU.reshape(-1), case.arena_NU.shape[1], case.segments
    found = []
    for s in range(len(segments)):
        rank, rows = int(segments.rank[0, s]), slice(int(segments.row_start[s]), int(segments.row_stop[s]))
        widths = (case.shapes[0].in_width, case.shapes[0].out_width)
        starts = (int(segments.a_first[0, s]) * unit, int(segments.b_first[0, s]) * unit)
        a_RI, b_RO = (
            flat[at : at + rank * width].reshape(rank, width).clone() for at, width in zip(starts, widths, strict=True)
        )
        found.append((rows, a_RI, b_RO))
    return found


def _loop(case: Case) -> Work:
    operands, x_TI, out_TO = _operands(case), case.x_TI[0], case.y_TO[0].clone()

    def once() -> torch.Tensor:
        out_TO.copy_(case.y_TO[0])
        for rows, a_RI, b_RO in operands:
            out_TO[rows] += x_TI[rows] @ a_RI.T @ b_RO
        return out_TO

    return once


def _padded(case: Case, rank: int) -> Work:
    """Every row gathers its adapter's operands, padded to one rank."""
    operands, x_TI, out_TO = _operands(case), case.x_TI[0], case.y_TO[0].clone()
    a_SRI, b_SRO = (torch.stack([one[part] for one in operands]) for part in (1, 2))
    of_row_T = torch.cat([torch.full((rows.stop - rows.start,), s) for s, (rows, _, _) in enumerate(operands)]).to(
        x_TI.device
    )
    assert a_SRI.shape[1] == rank

    def once() -> torch.Tensor:
        out_TO.copy_(case.y_TO[0])
        s_T1R = torch.bmm(x_TI[:, None], a_SRI[of_row_T].transpose(1, 2))
        out_TO.add_(torch.bmm(s_T1R, b_SRO[of_row_T])[:, 0])
        return out_TO

    return once
