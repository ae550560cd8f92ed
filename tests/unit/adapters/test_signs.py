"""32 signs in an int32, and back: any shape, any values."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from motet.adapters.signs import pack, unpack, words
from motet.kernels import sign as kernels_sign

shapes = st.tuples(st.integers(1, 5), st.integers(1, 100))


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_what_is_packed_comes_back(shape: tuple[int, int], seed: int) -> None:
    values_OI = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()
    word_OP = pack(values_OI)
    assert (word_OP.dtype, word_OP.shape) == (torch.int32, (shape[0], words(shape[1])))
    assert torch.equal(unpack(word_OP, shape[1]), torch.where(values_OI < 0, -1.0, 1.0))


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_bit_k_of_word_p_is_input_32_p_plus_k(shape: tuple[int, int], seed: int) -> None:
    values_OI = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for row, packed in zip(values_OI.tolist(), pack(values_OI).tolist(), strict=True):
        number = sum((value >= 0) << i for i, value in enumerate(row))
        assert number == sum((word & 0xFFFFFFFF) << 32 * p for p, word in enumerate(packed))


def test_zero_counts_as_positive_whatever_its_sign() -> None:
    assert unpack(pack(torch.tensor([[0.0, -0.0, -1e-45]])), 3).tolist() == [[1, 1, -1]]


def test_an_operand_need_not_be_contiguous() -> None:
    values_OI = torch.randn(7, 40)
    assert torch.equal(pack(values_OI.T), pack(values_OI.T.contiguous()))
    assert torch.equal(unpack(pack(values_OI)[::2], 40), unpack(pack(values_OI), 40)[::2])


def test_the_kernels_read_the_same_words() -> None:
    assert [words(width) for width in (1, 32, 33, 576)] == [kernels_sign.words(width) for width in (1, 32, 33, 576)]
