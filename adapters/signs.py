"""Signs of weights, 32 in an int32: bit k of word p of a row is the input 32 p + k, 1 for +1 and 0 for -1.

Must not know: what the signs are of. The kernels read the same words.

Shapes: O rows, I columns, P words of a row.
"""

from __future__ import annotations

import numpy as np
import torch

WORD_BITS = 32


def words(columns: int) -> int:
    """P: int32 words of a row with so many columns; what the last one has beyond them is 0."""
    return -(-columns // WORD_BITS)


def pack(values_OI: torch.Tensor) -> torch.Tensor:
    """[O, P] int32: the signs of the values, zero counting as positive."""
    bits = np.packbits((values_OI >= 0).numpy(), axis=1, bitorder="little")
    n_bytes = words(values_OI.shape[1]) * WORD_BITS // 8
    padded = np.pad(bits, ((0, 0), (0, n_bytes - bits.shape[1])))
    return torch.from_numpy(padded.view("<i4").astype(np.int32, copy=False))


def unpack(word_OP: torch.Tensor, columns: int) -> torch.Tensor:
    """[O, I] float32 of +1 and -1."""
    octets = np.ascontiguousarray(word_OP.numpy(), dtype="<i4").view(np.uint8)
    bits = np.unpackbits(octets, axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits).float().mul_(2).sub_(1)
