"""Sends a plan and collects what came back. Knows nothing of what requests say or how results are reported."""

import asyncio
import os
from dataclasses import dataclass
from time import perf_counter

from tests.bench.arrivals import ClosedLoop
from tests.bench.client import Endpoint, stream_completion
from tests.bench.cpu_usage import CpuMeter, CpuUsage
from tests.bench.timeline import Timeline
from tests.bench.workload import PlannedRequest, Workload, plan

_OPEN_LOOP_WARMUP_CONCURRENCY = 8


class WarmupError(RuntimeError):
    """A warm-up request failed: what would follow is not worth measuring."""


@dataclass(frozen=True)
class Conduct:
    """How requests are sent and judged, whatever they are.

    Args:
        allow_merged_chunks: several tokens in one chunk are counted but are no error.
    """

    endpoint: Endpoint
    timeout_s: float = 600
    allow_merged_chunks: bool = False
    server_pid: int | None = None


@dataclass(frozen=True)
class Measurement:
    timelines: list[Timeline]
    cpu: CpuUsage
    load_before: tuple[float, float, float]


async def measure(conduct: Conduct, workload: Workload) -> Measurement:
    """Warms up, lets that drain, then measures.

    Raises:
        WarmupError: a warm-up request failed.
    """
    planned = plan(workload)
    pacing = workload.pacing
    concurrency = pacing.concurrency if isinstance(pacing, ClosedLoop) else _OPEN_LOOP_WARMUP_CONCURRENCY
    for timeline in await _closed_loop(conduct, planned.warmup, concurrency):
        if timeline.failure is not None:
            raise WarmupError(f"{timeline.model}: {timeline.failure.kind}: {timeline.failure.detail}")
    load_before = os.getloadavg()
    meter = CpuMeter(conduct.server_pid)
    if planned.offsets_s is None:
        timelines = await _closed_loop(conduct, planned.measured, concurrency)
    else:
        timelines = await _open_loop(conduct, planned.measured, planned.offsets_s)
    return Measurement(timelines, meter.stop(), load_before)


async def _closed_loop(conduct: Conduct, requests: tuple[PlannedRequest, ...], concurrency: int) -> list[Timeline]:
    waiting = iter(requests)

    async def keep_one_in_flight() -> list[Timeline]:
        return [await _send(conduct, request, perf_counter()) for request in waiting]

    async with asyncio.TaskGroup() as group:
        slots = [group.create_task(keep_one_in_flight()) for _ in range(min(concurrency, len(requests)))]
    return [timeline for slot in slots for timeline in slot.result()]


async def _open_loop(
    conduct: Conduct, requests: tuple[PlannedRequest, ...], offsets_s: tuple[float, ...]
) -> list[Timeline]:
    start_s = perf_counter()
    tasks: list[asyncio.Task[Timeline]] = []
    async with asyncio.TaskGroup() as group:
        for request, offset_s in zip(requests, offsets_s, strict=True):
            due_s = start_s + offset_s
            await asyncio.sleep(max(0.0, due_s - perf_counter()))
            tasks.append(group.create_task(_send(conduct, request, due_s)))
    return [task.result() for task in tasks]


async def _send(conduct: Conduct, request: PlannedRequest, due_s: float) -> Timeline:
    return await stream_completion(conduct.endpoint, request, due_s, conduct.timeout_s, conduct.allow_merged_chunks)
