"""Weights in the order in which the native products read them.

Must not know: models, adapters. A bfloat16 weight [O, I] becomes blocks of 16 outputs; in a block, pairs of inputs of
each of the 16 outputs. Float32 has single inputs in place of pairs. Outputs beyond the last are zero. Weights in int8
lie in the same order, with a scale for each output.

Shapes: O/I out and in width, B blocks, U units of four bytes of an input row, E elements of a unit.
"""

from __future__ import annotations

import torch

from motet.kernels.cpu.compiled import DTYPES, LANES, Engine, Linear, address

LARGEST_INT8 = 127


def can_pack(weight_OI: torch.Tensor) -> bool:
    """Whether there is a native product for this dtype and width."""
    return (
        weight_OI.device.type == "cpu" and weight_OI.dtype in DTYPES and weight_OI.shape[1] % _elements(weight_OI) == 0
    )


def packed_shape(weight_OI: torch.Tensor, elements: int) -> tuple[int, int, int, int]:
    """[B, U, 16, E]."""
    out_width, in_width = weight_OI.shape
    return (-(-out_width // LANES), in_width // elements, LANES, elements)


def pack(weight_OI: torch.Tensor, elements: int) -> torch.Tensor:
    """[B, U, 16, E] of the same dtype, E elements to a unit of the inputs."""
    blocks, units, _, _ = packed_shape(weight_OI, elements)
    whole_OI = torch.nn.functional.pad(weight_OI, (0, 0, 0, blocks * LANES - len(weight_OI)))
    return whole_OI.view(blocks, LANES, units, elements).transpose(1, 2).contiguous()


def unpack(packed_BULE: torch.Tensor, out_width: int) -> torch.Tensor:
    """[O, I], a copy."""
    return packed_BULE.transpose(1, 2).reshape(len(packed_BULE) * LANES, -1)[:out_width]


def to_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, I] int8 and [O] float32 scales: the nearest multiple of a 127th of each output's largest weight."""
    weight_OI = weight_OI.detach().float()
    scale_O = weight_OI.abs().amax(dim=1) / LARGEST_INT8
    scale_O = torch.where(scale_O > 0, scale_O, 1.0)
    return (weight_OI / scale_O[:, None]).round().to(torch.int8), scale_O


def _elements(weight_OI: torch.Tensor) -> int:
    return 4 // weight_OI.itemsize


class PackedLinear:
    """A linear's own product, with a packed copy of its weight."""

    def __init__(self, engine: Engine, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._engine = engine
        self._elements = _elements(weight_OI)
        self._packed = self._pack(weight_OI.detach())
        self._scale: torch.Tensor | None = None
        self._bias = None if bias_O is None else bias_O.detach().float().contiguous()
        self.out_width, self.in_width = weight_OI.shape

    def _pack(self, weight_OI: torch.Tensor) -> torch.Tensor:
        packed = pack(weight_OI, self._elements)
        return self._engine.pages.empty(packed.shape, packed.dtype).copy_(packed)

    def described(self, target: int = 0, *, bias: bool = True) -> Linear:
        """As the native functions read it; the weight must outlive it."""
        scale = None if self._scale is None else address(self._scale)
        known = None if self._bias is None or not bias else address(self._bias)
        return Linear(address(self._packed), scale, known, self.in_width, self.out_width, target)

    def quantise(self, weight_OI: torch.Tensor) -> None:
        """From now on multiply with the weight in int8; what described it before describes it no more."""
        rounded_OI, self._scale = to_int8(weight_OI)
        self._packed = self._pack(rounded_OI)

    def unpacked(self) -> torch.Tensor:
        """[O, I] the exact weight, a copy."""
        assert self._scale is None, "a weight in int8 cannot be had back"
        return unpack(self._packed, self.out_width)

    def multiply(self, x_TI: torch.Tensor, *, bias: bool) -> torch.Tensor:
        """[T, O] W x, with the bias where asked for and there is one."""
        y_TO = torch.empty((len(x_TI), self.out_width), dtype=x_TI.dtype)
        self._engine.linear(self.described(bias=bias), x_TI.contiguous(), y_TO)
        return y_TO
