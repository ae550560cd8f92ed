"""Any batch of any sparse adapters: each backend equals the specification, and the specification dense deltas."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings, strategies as st

from motet.kernels.dispatch import Backend
from tests.support.low_rank import Run
from tests.support.sparse import SparseCase, make_sparse_case
from tests.support.tolerances import TOLERANCES

N_ADAPTERS = 4
UNIT = 32
widths = st.sampled_from([32, 64, 96])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
adapters = st.none() | st.integers(0, N_ADAPTERS - 1)
batches = st.lists(st.builds(Run, adapter=adapters, n_rows=st.integers(1, 40) | st.just(1)), min_size=1, max_size=20)


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> SparseCase:
    """Ragged counts, 0 and 1 and all of a width among them; rows cut anew for the second effect."""
    shapes = draw(st.lists(st.tuples(widths, widths), min_size=1, max_size=3))
    count = st.sampled_from([0, 0, 1, 3, 16, 21, 32])
    counts = st.lists(st.tuples(*[count] * len(shapes)), min_size=N_ADAPTERS, max_size=N_ADAPTERS)
    runs = draw(batches)
    row_runs = None
    if draw(st.booleans()):
        n_rows = sum(run.n_rows for run in runs)
        cuts = sorted(draw(st.sets(st.integers(1, max(n_rows - 1, 1)), max_size=6)) - {n_rows})
        bounds = [0, *cuts, n_rows]
        row_runs = [Run(draw(adapters), stop - start) for start, stop in pairwise(bounds)]
    return make_sparse_case(
        runs,
        draw(counts),
        draw(counts),
        shapes,
        unit=UNIT,
        dtype=draw(dtypes),
        row_runs=row_runs,
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases(dtypes))
def test_reference_equals_dense(case: SparseCase) -> None:
    for c, actual in enumerate(case.run("reference")):
        TOLERANCES["sparse reference", actual.dtype].assert_close(actual, case.expected_TO[c], case.magnitude_TO[c])


@settings(max_examples=60, deadline=None)
@given(case=cases(dtypes))
def test_cpu_equals_reference(case: SparseCase) -> None:
    _check(case, "cpu")


@settings(max_examples=10, deadline=None)  # the interpreter is slow, and multiplies the bit patterns of bfloat16
@given(case=cases(st.sampled_from([torch.float32, torch.float16])))
def test_triton_equals_reference(case: SparseCase) -> None:
    _check(case, "triton")


def _check(case: SparseCase, backend: Backend) -> None:
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.run("reference"), strict=True)):
        TOLERANCES["sparse", actual.dtype].assert_close(actual, expected, case.magnitude_TO[c])
        idle = ~case.live_TO[c]
        assert torch.equal(actual[idle].view(torch.uint8), case.y_TO[c][idle].view(torch.uint8))
