"""Every value of the base counts: lowered adapters are kept under its fingerprint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from motet.server.model.fingerprint import fingerprint


def model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Sequential:
    """A matrix of more values than any sample, a vector, and a tied weight."""
    random = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 96, bias=False), nn.Linear(200, 96, bias=False))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    made[2].weight = made[1].weight
    return made.to(device, dtype)


def matrix(changed: nn.Sequential) -> torch.Tensor:
    return changed[0].weight.detach()


def swap(values: torch.Tensor, one: object, other: object) -> None:
    kept = values[one].clone()  # type: ignore[index]
    values[one] = values[other]  # type: ignore[index]
    values[other] = kept  # type: ignore[index]


def one_rectangle(values: torch.Tensor) -> None:
    """Rows and columns keep their elements where the corners are equal in pairs."""
    values[0, 0] = values[5, 7] = 1.0
    values[0, 7] = values[5, 0] = 2.0


def other_rectangle(values: torch.Tensor) -> None:
    values[0, 0] = values[5, 7] = 2.0
    values[0, 7] = values[5, 0] = 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values_have_the_same_fingerprint(dtype: torch.dtype) -> None:
    one = fingerprint(model(dtype))
    assert one == fingerprint(model(dtype))
    assert len(one) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (7, 13), (100, 95), (199, 95)])
def test_one_element_anywhere_counts(dtype: torch.dtype, place: tuple[int, int]) -> None:
    changed = model(dtype)
    matrix(changed)[place] = torch.nextafter(matrix(changed)[place], torch.tensor(9.0, dtype=dtype))
    assert fingerprint(changed) != fingerprint(model(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: swap(values, 3, 4),
        lambda values: swap(values.T, 3, 4),
        lambda values: swap(values, (8, 9), (8, 10)),
        lambda values: swap(values, (8, 9), (150, 40)),
        lambda values: values[0, :1].neg_(),
    ],
    ids=["rows", "columns", "elements of a row", "elements", "a sign"],
)
def test_order_and_signs_count(change: Callable[[torch.Tensor], None]) -> None:
    changed = model()
    change(matrix(changed))
    assert fingerprint(changed) != fingerprint(model())


def test_a_change_that_keeps_the_sums_of_rows_and_columns_counts() -> None:
    one, other = model(), model()
    one_rectangle(matrix(one))
    other_rectangle(matrix(other))
    assert fingerprint(one) != fingerprint(other)


def test_signed_zeros_differ() -> None:
    one, other = model(), model()
    matrix(one)[0, 0] = 0.0
    matrix(other)[0, 0] = -0.0
    assert fingerprint(one) != fingerprint(other)


def test_a_vector_counts() -> None:
    changed = model()
    swap(changed[0].bias.detach(), 0, 1)
    assert fingerprint(changed) != fingerprint(model())


def test_dtype_and_names_count() -> None:
    values = torch.zeros(4, 4)  # the same bytes in both dtypes

    def of(name: str, dtype: torch.dtype) -> str:
        made = nn.Module()
        made.register_parameter(name, nn.Parameter(values.to(dtype)))
        return fingerprint(made)

    assert len({of("a", torch.float16), of("a", torch.bfloat16), of("b", torch.float16)}) == 3


def test_the_layout_in_memory_does_not_count() -> None:
    changed = model()
    changed[0].weight = nn.Parameter(changed[0].weight.detach().T.contiguous().T)
    assert not changed[0].weight.is_contiguous()
    assert fingerprint(changed) == fingerprint(model())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_does_not_count(dtype: torch.dtype) -> None:
    assert fingerprint(model(dtype, "cuda")) == fingerprint(model(dtype))
