"""Where the CPU path cuts a batch."""

from __future__ import annotations

import numpy as np

from motet.kernels.cpu.blocks import CostModel, cut

WIDTH = 1000
# One block costs 100 multiply-adds per width element; copies are free unless a test says otherwise.
COST = CostModel(block=100 * WIDTH, copied_element=0)


def _cut(
    rows: list[int], ranks: list[int], operands: list[int] | None = None, cost: CostModel = COST
) -> list[list[int]]:
    stop = np.cumsum(rows, dtype=np.int32)
    start = stop - np.array(rows, dtype=np.int32)
    rank = np.array(ranks, dtype=np.int32)
    blocks = cut(start, stop, rank, operands or list(range(len(rows))), WIDTH, cost)
    return [block.segments for block in blocks]


def test_decode_rows_share_blocks_until_the_waste_costs_one() -> None:
    # n rows of rank 4 waste 4 n (n − 1): 80 for five, 120 for six.
    assert _cut([1] * 12, [4] * 12) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_long_segments_stand_alone() -> None:
    assert _cut([50, 50], [4, 4]) == [[0], [1]]


def test_decode_rows_share_beside_a_long_segment() -> None:
    assert _cut([1, 1, 50, 1, 1], [4] * 5) == [[0, 1], [2], [3, 4]]


def test_equal_operands_waste_nothing() -> None:
    assert _cut([50, 50], [4, 4], operands=[7, 7]) == [[0, 1]]


def test_untouched_segments_are_in_no_block() -> None:
    assert _cut([1, 1, 1], [4, 0, 4]) == [[0, 2]]
    assert _cut([1, 1], [0, 0]) == []


def test_an_operand_dearer_to_copy_than_a_block_is_read_in_place() -> None:
    dear = CostModel(block=100 * WIDTH, copied_element=10)
    assert _cut([1, 1, 1], [4, 11, 4], cost=COST) == [[0, 1, 2]]
    assert _cut([1, 1, 1], [4, 11, 4], cost=dear) == [[0], [1, 2]]
