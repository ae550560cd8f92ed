"""What lossy forms of a full fine-tune cost and miss: bytes, seconds to load, decode steps, log-probabilities.

Takes a model directory that was trained from the default model, as `motet train lisa` or `full` leaves one; without one
it makes a random change of every layer, which is harder to approximate than a trained one. Run it from the repository
root, alone on a core if it can be had; one line is appended:

    OMP_NUM_THREADS=1 python -m tests.bench.approximate --folder DIR --out docs/results/approximate-cpu.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from motet.adapters.registry import Registry
from motet.adapters.spec import Declared, LossyForm
from motet.server import serve as serving
from motet.server.config import ServeConfig
from motet.server.engine.types import Applied, BlockId, GenerationId, Plan, Sampling, Span
from motet.server.model.default_model import ensure_default_model
from motet.server.model.runner import ModelRunner
from tests.bench.lines import append, surroundings

FORMS = ("exact", "svd-8", "svd-32", "1bit")
BATCHES = (1, 8)
"""Rows of a decode step, all of the adapter."""
CHANGE = 0.0025
"""‖ΔW‖/‖W‖ of the random change: the median of the weights that ten steps of LISA changed at its recipe's rate."""
PROMPT_TOKENS = 63
WARM_UPS, ROUNDS = 3, 30


@dataclass(frozen=True)
class Result:
    """One form; the base's decode steps are those of form "base".

    Attributes:
        load_s: reading, lowering, approximating and measuring.
        weights: how many linears were approximated.
        missed: ‖Δ - Δ̂‖/‖Δ‖ over them.
        logprob_error: largest and mean |difference| of the log-probabilities of the fixed texts, in nats.
        decode_ms: rows → median of a decode step.
    """

    form: str
    resident_bytes: int
    load_s: float
    weights: int
    missed: float
    logprob_error: dict[str, float]
    decode_ms: dict[str, float]


@torch.no_grad()
def random_fine_tune(folder: Path, seed: int = 0) -> None:
    """A model directory of which every layer differs from the default model by random numbers."""
    model = AutoModelForCausalLM.from_pretrained(ensure_default_model(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if ".layers." in path:
            size = CHANGE * parameter.square().mean().sqrt()
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.bfloat16().save_pretrained(folder)


def measure(folder: Path, dtype: str, forms: Sequence[str]) -> tuple[str, list[Result]]:
    """Load every form through the running engine, then time decode steps by hand; also the dtype that was chosen."""
    config = ServeConfig(dtype=dtype, adapter_cache="off", adapter_memory="2GiB")
    assembled = serving.assemble(config, print)
    loads: dict[str, float] = {}

    async def loaded() -> Registry:
        async with serving.opened(config, assembled) as service:
            for form in forms:
                began_s = time.monotonic()
                declared = Declared(approximate=None if form == "exact" else LossyForm.parse(form))
                await asyncio.to_thread(service.registry.load, form, folder, declared)
                loads[form] = time.monotonic() - began_s
            return service.registry

    registry = asyncio.run(loaded())
    torch.set_num_threads(1)
    steps = _decode_ms(assembled.steps.runner, registry, [None, *forms], config.block_size)
    results = [Result("base", 0, 0, 0, 0, {}, steps[None])]
    for form in forms:
        receipt = registry.get(form).receipt
        error = receipt.error
        logprobs = error.logprobs if error else None
        results.append(
            Result(
                form=form,
                resident_bytes=receipt.resident_bytes,
                load_s=round(loads[form], 2),
                weights=len(error.change.targets) if error else 0,
                missed=error.change.relative if error else 0,
                logprob_error={"largest": logprobs.largest, "mean": logprobs.mean} if logprobs else {},
                decode_ms=steps[form],
            )
        )
    return str(assembled.loaded.dtype).removeprefix("torch."), results


def _decode_ms(
    runner: ModelRunner, registry: Registry, names: Sequence[str | None], block_size: int
) -> dict[str | None, dict[str, float]]:
    """The forms take turns, so that a busy machine is busy for all."""
    times: dict[tuple[str | None, int], list[float]] = {(name, rows): [] for name in names for rows in BATCHES}
    per_row = -(-(PROMPT_TOKENS + 1) // block_size)
    leases = {name: registry.acquire(name) for name in names if name is not None}
    assert registry.tiers.hold(list(leases.values())), "all forms are on the device"
    plans = {}
    for name, rows in times:
        applied = () if name is None else (Applied(leases[name]),)
        blocks = [tuple(BlockId(row * per_row + b) for b in range(per_row)) for row in range(rows)]
        for tokens, start in ((tuple(range(1, PROMPT_TOKENS + 1)), 0), ((7,), PROMPT_TOKENS)):
            spans = [
                Span(GenerationId(row), applied, tokens, start, blocks[row], True, Sampling(max_tokens=1), 0)
                for row in range(rows)
            ]
            plans[name, rows, start] = Plan(tuple(spans))
    for round_ in range(WARM_UPS + ROUNDS):
        for (name, rows), taken in times.items():
            if round_ == 0:
                runner.run(plans[name, rows, 0])
            began_ns = time.perf_counter_ns()
            runner.run(plans[name, rows, PROMPT_TOKENS])
            taken.append((time.perf_counter_ns() - began_ns) / 1e6)
    registry.tiers.let_go(list(leases.values()))
    for lease in leases.values():
        registry.release(lease)
    return {name: {str(rows): round(median(times[name, rows][WARM_UPS:]), 2) for rows in BATCHES} for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a fine-tune of the default model; a random one where left out")
    parser.add_argument("--trained-by", help="how the folder was made, for the result")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    head = surroundings("torch", "transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder
        if folder is None:
            folder = Path(scratch) / "model"
            random_fine_tune(folder)
        dtype, results = measure(folder, options.dtype, FORMS)
    line = {
        **head,
        "arguments": {
            "fine_tune": f"random, {CHANGE} of every weight" if options.folder is None else options.trained_by,
            "dtype": dtype,
            "threads": 1,
            "rounds": ROUNDS,
        },
        "results": [asdict(result) for result in results],
    }
    append(options.out, line)
    for result in results:
        print(*asdict(result).values())


if __name__ == "__main__":
    main()
