"""The native CPU backend: its C ABI as Python sees it, and whether there is one.

Must not know: adapters, requests, which model it serves. The structs mirror native/api.h field by field; all fields
take eight bytes. Pointers are borrowed: whoever fills a struct in keeps what it points to.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.kernels.cpu.pages import LargePages
from motet.kernels.errors import BackendUnavailableError

LANES = 16
"""Outputs of a block of packed weights."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What it computes with, and the number that the C ABI knows it by."""


class Processor(enum.IntEnum):
    """Whose instructions are used."""

    ANY = 0
    AVX2 = 1
    AVX512_BF16 = 2


class Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("packed", "scale", "bias")),
        *((name, c_int64) for name in ("in_", "out", "target")),
    )


class Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "keys", "values")),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        *((name, c_int64) for name in ("n_layers", "hidden", "heads", "kv_heads", "head_width")),
        *((name, c_double) for name in ("eps", "score_scale")),
        ("final_norm", c_void_p),
        ("head", Linear),
    )


class LowRank(Structure):
    _fields_ = (
        ("segments", c_int64),
        *((name, c_void_p) for name in ("row_start", "row_stop", "a_first", "b_first", "rank")),
        *((name, c_void_p) for name in ("gate_of_row", "gate_factor")),
        *((name, c_int64) for name in ("gates", "gate_width")),
    )


class RowVectors(Structure):
    _fields_ = (
        ("segments", c_int64),
        *((name, c_void_p) for name in ("row_start", "row_stop", "first", "present")),
    )


class Effects(Structure):
    _fields_ = (
        ("arena", c_void_p),
        *((name, c_int64) for name in ("unit", "targets")),
        ("low_rank", POINTER(LowRank)),
        ("n_low_rank", c_int64),
        *((name, POINTER(RowVectors)) for name in ("scales", "biases")),
    )


class Step(Structure):
    _fields_ = (
        ("model", POINTER(Model)),
        ("effects", POINTER(Effects)),
        ("rows", c_int64),
        *((name, c_void_p) for name in ("embedded", "cos", "sin", "positions", "sequence", "first_block", "blocks")),
        ("block_size", c_int64),
        ("begun", c_void_p),
        ("n_begun", c_int64),
        ("kept", c_void_p),
        ("n_kept", c_int64),
        *((name, c_void_p) for name in ("normed", "logits")),
    )


_LAYOUT = sum(
    100**place * ctypes.sizeof(struct)
    for place, struct in enumerate((Linear, Layer, Model, LowRank, RowVectors, Effects, Step))
)


@functools.cache
def entry_points() -> Any | None:
    """The compiled functions; None where the package was installed without a compiler."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    functions: Any = ctypes.CDLL(str(found[0]))
    functions.motet_layout.restype = c_int64
    functions.motet_new.restype = c_void_p
    functions.motet_new.argtypes = (c_int, c_int)
    functions.motet_free.argtypes = functions.motet_poison.argtypes = (c_void_p,)
    functions.motet_step.argtypes = (c_void_p, c_int, POINTER(Step))
    functions.motet_linear.argtypes = (c_void_p, c_int, POINTER(Linear), c_int64, c_void_p, c_void_p)
    functions.motet_low_rank.argtypes = (
        c_void_p,
        c_int,
        POINTER(Effects),
        POINTER(Linear),
        c_int64,
        c_void_p,
        c_void_p,
    )
    for name in ("motet_free", "motet_poison", "motet_step", "motet_linear", "motet_low_rank"):
        getattr(functions, name).restype = None
    if functions.motet_layout() != _LAYOUT:
        raise BackendUnavailableError("the compiled CPU backend is of another version of Motet; install it again")
    return functions


def processors() -> Sequence[Processor]:
    """What this machine runs, the fastest last; empty without the compiled functions."""
    functions = entry_points()
    return [] if functions is None else [one for one in Processor if functions.motet_runs_on(one.value)]


class Engine:
    """Threads and memory of the native backend.

    Attributes:
        pages: memory for weights.

    Note: may be called from any thread; one call runs at a time. Its threads spin for 50 µs after a call and sleep.
    """

    def __init__(self, threads: int, processor: Processor | None = None) -> None:
        """Start the threads.

        Args:
            threads: that compute, the caller's included.
            processor: None is the fastest.

        Raises:
            BackendUnavailableError: there are no compiled functions, or not for the processor.
        """
        functions, possible = entry_points(), processors()
        if functions is None:
            raise BackendUnavailableError(
                "backend 'native' was not compiled when Motet was installed; install a C++20 compiler and Motet again"
            )
        self.processor = possible[-1] if processor is None else processor
        self.pages = LargePages()
        self._functions = functions
        self._address = self._functions.motet_new(threads, self.processor.value)
        if self._address is None:
            raise BackendUnavailableError(f"this machine does not run {self.processor.name}; it runs {possible}")

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None:
            self._functions.motet_free(self._address)

    def poison(self) -> None:
        """Fill the memory that is kept between calls with NaN."""
        self._functions.motet_poison(self._address)

    def step(self, dtype: torch.dtype, step: Step) -> None:
        """All layers of a step."""
        self._functions.motet_step(self._address, DTYPES[dtype], ctypes.byref(step))

    def linear(self, linear: Linear, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """``y = W x + c``; both contiguous, of one dtype of `DTYPES`."""
        code = DTYPES[x_TI.dtype]
        self._functions.motet_linear(
            self._address, code, ctypes.byref(linear), len(x_TI), x_TI.data_ptr(), y_TO.data_ptr()
        )

    def low_rank(self, effects: Effects, linear: Linear, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """``y += B (g ⊙ (A x))`` of the linear's target; both contiguous, of one dtype of `DTYPES`."""
        code = DTYPES[x_TI.dtype]
        self._functions.motet_low_rank(
            self._address,
            code,
            ctypes.byref(effects),
            ctypes.byref(linear),
            len(x_TI),
            x_TI.data_ptr(),
            y_TO.data_ptr(),
        )


def address(values: np.ndarray | torch.Tensor) -> int:
    """Where contiguous values begin."""
    if isinstance(values, torch.Tensor):
        assert values.is_contiguous(), f"strides {values.stride()}"
        return values.data_ptr()
    assert values.flags.c_contiguous, f"strides {values.strides}"
    return values.ctypes.data
