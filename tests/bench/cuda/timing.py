"""How long work on a device takes. Knows nothing of what the work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Work = Callable[[], object]


def dtype_of(device: torch.device) -> torch.dtype:
    """What is computed in: Triton's interpreter is wrong in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def milliseconds(works: Mapping[str, Work], device: torch.device, rounds: int, warm_ups: int = 3) -> dict[str, float]:
    """Median time of each; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_ups + rounds):
        for name, work in works.items():
            one_ms = _once_ms(work, device)
            if turn >= warm_ups:
                taken[name].append(one_ms)
    return {name: median(times) for name, times in taken.items()}


def _once_ms(work: Work, device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began_s)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))


def repeated(work: Work, times: int, device: torch.device) -> Work:
    """The work so many times, on CUDA as one captured graph, so that launching it from Python costs nothing."""
    if device.type != "cuda":
        return lambda: [work() for _ in range(times)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph.replay


def copy_bytes_per_s(device: torch.device, bytes_: int, rounds: int) -> float:
    """What a plain copy reads and writes: the bound that a kernel's bytes are held against."""
    source = torch.empty(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took_ms = milliseconds({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * bytes_ / took_ms * 1000
