"""Any batch of any adapters: the fast CPU path equals the specification, and the specification dense products."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from tests.support.low_rank import Gate, Run, make_case
from tests.support.tolerances import TOLERANCES

N_ADAPTERS = 4
UNIT = 32
widths = st.sampled_from([32, 64, 96])
gates: st.SearchStrategy[Gate] = st.sampled_from(["none", "random", "zero", "one-hot"])
batches = st.lists(
    st.builds(Run, adapter=st.none() | st.integers(0, N_ADAPTERS - 1), n_rows=st.integers(1, 40) | st.just(1)),
    min_size=1,
    max_size=8,
)


@st.composite
def targets(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """[C] shapes and [adapters][C] ranks."""
    shapes = draw(st.lists(st.tuples(widths, widths), min_size=1, max_size=3))
    rank = st.sampled_from([0, 1, 3, 8, 16, 21])
    by_target = st.lists(rank, min_size=len(shapes), max_size=len(shapes))
    return shapes, draw(st.lists(by_target, min_size=N_ADAPTERS, max_size=N_ADAPTERS))


@settings(max_examples=40, deadline=None)
@given(batch=batches, targets=targets(), gate=gates, seed=st.integers(0, 2**16))
def test_cpu_equals_reference_equals_dense(
    batch: list[Run], targets: tuple[list[tuple[int, int]], list[list[int]]], gate: Gate, seed: int
) -> None:
    shapes, ranks = targets
    case = make_case(batch, ranks, shapes, unit=UNIT, dtype=torch.float32, gate=gate, seed=seed)
    reference_TO = case.run("reference")
    for c, reference in enumerate(reference_TO):
        TOLERANCES["low_rank reference", torch.float32].assert_close(
            reference, case.expected_TO[c], case.magnitude_TO[c]
        )
    for backend in ("cpu", "native"):
        for c, actual in enumerate(case.run(backend)):
            TOLERANCES["low_rank", torch.float32].assert_close(actual, reference_TO[c], case.magnitude_TO[c])


@settings(max_examples=10, deadline=None)  # the interpreter is slow
@given(batch=batches, targets=targets(), gate=gates, seed=st.integers(0, 2**16))
def test_triton_equals_reference(
    batch: list[Run], targets: tuple[list[tuple[int, int]], list[list[int]]], gate: Gate, seed: int
) -> None:
    shapes, ranks = targets
    case = make_case(batch, ranks, shapes, unit=UNIT, dtype=torch.float32, gate=gate, seed=seed)
    for c, (triton, reference) in enumerate(zip(case.run("triton"), case.run("reference"), strict=True)):
        TOLERANCES["low_rank", torch.float32].assert_close(triton, reference, case.magnitude_TO[c])
