"""One native engine for all tests: its threads are not started anew for each."""

from __future__ import annotations

import functools

from motet.kernels.cpu.compiled import Engine, Processor


@functools.cache
def native_engine(processor: Processor | None = None, threads: int = 2) -> Engine:
    """None is the fastest processor of this machine."""
    return Engine(threads, processor)
