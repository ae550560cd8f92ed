"""Products with weights in int8 are those with what torch rounds the weights to, on each processor.

Shapes: T batch rows, O/I out and in width.
"""

from __future__ import annotations

import pytest
import torch

from motet.kernels.cpu.compiled import Processor
from motet.kernels.cpu.packed import LARGEST_INT8, PackedLinear
from tests.support.int8 import rounded
from tests.support.native import native_engine
from tests.support.tolerances import TOLERANCES
from tests.unit.kernels.test_native import BF16, EVERY, FP32, SHAPES, engine_of


def _weight(out_width: int, in_width: int, dtype: torch.dtype) -> torch.Tensor:
    weight_OI = torch.randn(out_width, in_width, generator=torch.Generator().manual_seed(in_width)).to(dtype)
    weight_OI[::3] *= 100  # outputs have scales of their own
    return weight_OI


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_product_is_that_of_the_rounded_weight(
    processor: Processor, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, out_width, in_width = shape
    weight_OI, bias_O = _weight(out_width, in_width, dtype), torch.ones(out_width, dtype=dtype)
    linear = PackedLinear(engine_of(processor), weight_OI, bias_O)
    linear.quantise(weight_OI)
    x_TI = torch.randn(rows, in_width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight_OI = rounded(weight_OI).double()
    y_TO, magnitude_TO = x_TI.double() @ weight_OI.T + 1, x_TI.double().abs() @ weight_OI.abs().T + 1
    TOLERANCES["native product", dtype].assert_close(linear.multiply(x_TI, bias=True), y_TO, magnitude_TO)


@EVERY
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_few_rows_and_many_give_the_same_bits(processor: Processor, dtype: torch.dtype) -> None:
    """Though many read weights that were widened before, and few widen them as they read."""
    weight_OI = _weight(100, 194, dtype)
    linear = PackedLinear(engine_of(processor), weight_OI, None)
    linear.quantise(weight_OI)
    x_TI = torch.randn(40, 194, generator=torch.Generator().manual_seed(1)).to(dtype)
    together_TO = linear.multiply(x_TI, bias=False)
    for rows in (slice(0, 1), slice(3, 7), slice(20, 28), slice(39, 40)):
        assert torch.equal(linear.multiply(x_TI[rows], bias=False), together_TO[rows])


def test_rounding_misses_half_a_step_at_most_and_keeps_zeros() -> None:
    weight_OI = _weight(6, 64, FP32)
    weight_OI[2] = 0
    missed_OI = (rounded(weight_OI) - weight_OI).abs()
    step_O = weight_OI.abs().amax(dim=1) / LARGEST_INT8
    assert bool((missed_OI <= step_O[:, None] * 0.5001).all())
    linear = PackedLinear(native_engine(), weight_OI, None)
    linear.quantise(weight_OI)
    assert linear.multiply(torch.ones(1, 64), bias=False)[0, 2] == 0
    with pytest.raises(AssertionError, match="cannot be had back"):
        linear.unpacked()
