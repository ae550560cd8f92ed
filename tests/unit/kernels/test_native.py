"""The native backend's own products, on each processor this machine can be; its low-rank product is in test_low_rank.

Shapes: T batch rows, O/I out and in width.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from motet.kernels.cpu import compiled
from motet.kernels.cpu.compiled import Engine, Processor, processors
from motet.kernels.cpu.packed import PackedLinear, can_pack, pack, unpack
from motet.kernels.dispatch import low_rank_plan
from motet.kernels.errors import BackendUnavailableError
from tests.support.low_rank import Run, make_case
from tests.support.native import native_engine
from tests.support.tolerances import TOLERANCES

BF16, FP32 = torch.bfloat16, torch.float32
EVERY = pytest.mark.parametrize("processor", list(Processor))
SHAPES = [(1, 16, 2), (3, 5, 12), (8, 48, 72), (9, 200, 96), (70, 49, 194), (300, 100, 64)]
"""(T, O, I): rows around the tiles of 2, 4 and 8, outputs around blocks of 16 and groups of 48, sums around 96."""


def engine_of(processor: Processor) -> Engine:
    if processor not in processors():
        pytest.skip(f"this machine does not run {processor.name}")
    return native_engine(processor)


def _linear(
    engine: Engine, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool = True
) -> tuple[PackedLinear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The packed linear, x, and float64 y with Σ|term|."""
    rows, out_width, in_width = shape
    random = torch.Generator().manual_seed(rows)
    weight_OI = torch.randn(out_width, in_width, generator=random).to(dtype)
    x_TI = torch.randn(rows, in_width, generator=random).to(dtype)
    bias_O = torch.randn(out_width, generator=random).to(dtype) if bias else None
    y_TO = x_TI.double() @ weight_OI.double().T
    magnitude_TO = x_TI.double().abs() @ weight_OI.double().abs().T
    if bias_O is not None:
        y_TO += bias_O.double()
        magnitude_TO += bias_O.double().abs()
    return PackedLinear(engine, weight_OI, bias_O), x_TI, y_TO, magnitude_TO


def test_it_was_compiled() -> None:
    """Without it everything works, several times slower; here it must have been compiled."""
    assert Processor.ANY in processors(), "no compiled backend: make native"


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_product_is_the_dense_one(processor: Processor, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    linear, x_TI, y_TO, magnitude_TO = _linear(engine_of(processor), shape, dtype)
    TOLERANCES["native product", dtype].assert_close(linear.multiply(x_TI, bias=True), y_TO, magnitude_TO)


@EVERY
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(processor: Processor, dtype: torch.dtype) -> None:
    """Not by a bit: whichever tile it falls in, and however the rows are cut for the threads."""
    linear, x_TI, *_ = _linear(engine_of(processor), (300, 100, 194), dtype)
    together_TO = linear.multiply(x_TI, bias=True)
    for rows in (*(slice(t, t + 1) for t in (0, 7, 8, 255, 299)), slice(3, 8), slice(100, 113)):
        assert torch.equal(linear.multiply(x_TI[rows], bias=True), together_TO[rows])


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_change_nothing(threads: int) -> None:
    _, x_TI, *_ = _linear(native_engine(), (300, 100, 194), BF16)
    results = [
        _linear(engine, (300, 100, 194), BF16)[0].multiply(x_TI, bias=True)
        for engine in (native_engine(), Engine(threads))
    ]
    assert torch.equal(*results)


def test_callers_from_several_threads_wait_for_each_other() -> None:
    linear, x_TI, *_ = _linear(native_engine(), (9, 200, 96), FP32)
    expected_TO, right = linear.multiply(x_TI, bias=True), []

    def call() -> None:
        right.append(all(torch.equal(linear.multiply(x_TI, bias=True), expected_TO) for _ in range(200)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 4


@EVERY
def test_nan_and_infinity_stay_in_their_row(processor: Processor) -> None:
    linear, x_TI, *_ = _linear(engine_of(processor), (9, 48, 96), BF16)
    clean_TO = linear.multiply(x_TI, bias=True)
    x_TI[2, 5], x_TI[4, 7] = torch.nan, torch.inf
    actual_TO = linear.multiply(x_TI, bias=True)
    assert actual_TO[2].isnan().all()
    assert not actual_TO[4].isfinite().any()
    others = [0, 1, 3, 5, 6, 7, 8]
    assert torch.equal(actual_TO[others], clean_TO[others])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_packed_weight_is_the_weight(dtype: torch.dtype) -> None:
    weight_OI = torch.randn(49, 12).to(dtype)
    elements = 4 // dtype.itemsize
    packed = pack(weight_OI, elements)
    assert packed.shape == (4, 12 // elements, 16, elements)
    assert torch.equal(unpack(packed, 49), weight_OI)


def test_what_cannot_be_packed() -> None:
    assert can_pack(torch.zeros(3, 7))
    assert can_pack(torch.zeros(3, 8, dtype=BF16))
    assert not can_pack(torch.zeros(3, 7, dtype=BF16))
    assert not can_pack(torch.zeros(3, 8, dtype=torch.float16))
    assert not can_pack(torch.zeros(3, 8, device="meta"))


@EVERY
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_low_rank_products_on_every_processor(processor: Processor, dtype: torch.dtype) -> None:
    runs = [Run(0, 1), Run(None, 1), Run(1, 6), Run(2, 1), Run(0, 13)]
    ranks = [[16, 3], [0, 40], [5, 1]]
    case = make_case(runs, ranks, [(72, 192), (200, 136)], unit=8, dtype=dtype, gate="random")
    engine = engine_of(processor)
    case.run("native", engine)
    engine.poison()
    for c, (actual, expected) in enumerate(zip(case.run("native", engine), case.run("reference"), strict=True)):
        TOLERANCES["low_rank", dtype].assert_close(actual, expected, case.magnitude_TO[c])


@pytest.mark.parametrize(("dtype", "what"), [(torch.float16, "torch.float16"), (BF16, "widths such as 9")])
def test_what_it_does_not_compute_is_refused(dtype: torch.dtype, what: str) -> None:
    case = make_case([Run(0, 1)], [[2]], [(9, 6)], unit=3, dtype=dtype)
    with pytest.raises(BackendUnavailableError, match=f"{what}.* needs backend 'cpu'"):
        case.run("native")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "entry_points", lambda: None)
    assert compiled.processors() == []
    with pytest.raises(BackendUnavailableError, match=r"was not compiled.* install a C\+\+20 compiler"):
        Engine(1)


def test_a_backend_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structs of another layout would be read as nonsense."""
    monkeypatch.setattr(compiled, "_LAYOUT", compiled._LAYOUT + 8)
    with pytest.raises(BackendUnavailableError, match="another version"):
        compiled.entry_points.__wrapped__()


def test_a_plan_needs_an_engine() -> None:
    case: Any = make_case([Run(0, 1)], [[2]], [(8, 8)], unit=8, dtype=FP32)
    with pytest.raises(AssertionError, match="an engine's threads"):
        low_rank_plan("native", case.arena_NU, case.shapes, case.segments, case.n_rows)
