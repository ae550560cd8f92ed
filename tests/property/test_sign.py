"""Any batch of any packed signs: each backend equals the specification, and the specification dense signs."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from motet.kernels.dispatch import Backend
from tests.support.low_rank import Run
from tests.support.sign import SignCase, make_sign_case
from tests.support.tolerances import TOLERANCES

N_ADAPTERS = 3
UNIT = 20
widths = st.sampled_from([20, 40, 100])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
adapters = st.none() | st.integers(0, N_ADAPTERS - 1)
batches = st.lists(st.builds(Run, adapter=adapters, n_rows=st.integers(1, 40) | st.just(1)), min_size=1, max_size=20)


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> SignCase:
    shapes = draw(st.lists(st.tuples(widths, widths), min_size=1, max_size=3))
    has = draw(st.lists(st.tuples(*[st.booleans()] * len(shapes)), min_size=N_ADAPTERS, max_size=N_ADAPTERS))
    return make_sign_case(draw(batches), has, shapes, unit=UNIT, dtype=draw(dtypes), seed=draw(st.integers(0, 2**16)))


@settings(max_examples=60, deadline=None)
@given(case=cases(dtypes))
def test_reference_equals_dense(case: SignCase) -> None:
    for c, actual in enumerate(case.run("reference")):
        TOLERANCES["sign", actual.dtype].assert_close(actual, case.expected_TO[c], case.magnitude_TO[c])


@settings(max_examples=60, deadline=None)
@given(case=cases(dtypes))
def test_cpu_equals_reference(case: SignCase) -> None:
    _check(case, "cpu")


@settings(max_examples=10, deadline=None)  # the interpreter is slow, and multiplies the bit patterns of bfloat16
@given(case=cases(st.sampled_from([torch.float32, torch.float16])))
def test_triton_equals_reference(case: SignCase) -> None:
    _check(case, "triton")


def _check(case: SignCase, backend: Backend) -> None:
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.run("reference"), strict=True)):
        TOLERANCES["sign", actual.dtype].assert_close(actual, expected, case.magnitude_TO[c])
        idle_T = ~case.live_T[c]
        assert torch.equal(actual[idle_T].view(torch.uint8), case.y_TO[c][idle_T].view(torch.uint8))
