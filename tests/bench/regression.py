"""A small check of speed for CI: ratios of processor time between two kinds of step, taken in turns in one process.

No clock of a shared machine says how fast a step is, but one thread's processor time over another's, each the least of
many, stays where it is. Counts of instructions would be steadier; virtual machines mostly have no counter. Run it from
the repository root to append this machine's figures:

    OMP_NUM_THREADS=1 python -m tests.bench.regression --out docs/results/regression-cpu.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from motet.server.engine.types import Sampling
from tests.bench.lines import append, surroundings
from tests.bench.machine import Machine
from tests.bench.make_adapters import make_adapters
from tests.support.harness import Harness
from tests.support.models import tiny_llama

MOST_LOSS = 0.15
ROUNDS = 80
ADAPTERS = 8
_PROMPT_TOKENS, _PREFILL_TOKENS = 32, 128
_LAYERS, _VOCABULARY = 4, 4096
# the widths of SmolLM2-135M
_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": _LAYERS,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 1024,
}
_LINEARS = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
"""(in, out) of a layer's."""

Timed = Callable[[], float]
"""Does a thing once; its processor time in seconds."""


def _cpu_s(what: Callable[[], object]) -> float:
    began_s = time.process_time()
    what()
    return time.process_time() - began_s


def _prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(3, _VOCABULARY, (count, tokens), generator=generator).tolist()
    return drawn


def _decode(harness: Harness, adapters: Sequence[str], rows: int) -> Timed:
    """A decode step of so many rows; the adapters take turns."""
    using = [adapters[row % len(adapters)] if adapters else None for row in range(rows)]
    sampling = Sampling(max_tokens=2 * ROUNDS + 8, temperature=0)
    harness.submit(list(zip(_prompts(rows, _PROMPT_TOKENS, rows), using, strict=True)), sampling)
    for _ in range(4):  # all prompts, and the first decode steps
        harness.engine.step()
    return lambda: _cpu_s(harness.engine.step)


def _prefill(harness: Harness, adapter: str | None) -> Timed:
    """The step of one prompt that was never seen."""
    seeds = itertools.count(100)

    def once() -> float:
        harness.submit([(_prompts(1, _PREFILL_TOKENS, next(seeds))[0], adapter)], Sampling(max_tokens=1, temperature=0))
        return _cpu_s(harness.engine.step)

    return once


def _products(rows: int) -> Timed:
    """The base's products alone, each by torch; the head reads every row."""
    weights = [torch.randn(o, i).bfloat16() for i, o in _LINEARS * _LAYERS] + [torch.randn(_VOCABULARY, 576).bfloat16()]
    inputs = {width: torch.randn(rows, width).bfloat16() for width in (576, 1536)}

    def once() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return lambda: _cpu_s(once)


def measure(rounds: int = ROUNDS) -> dict[str, float]:
    """What is compared → the ratio of the least times."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_llama(**_SHAPE).bfloat16().eval()
        model.config.save_pretrained(scratch)
        folders = make_adapters(scratch, Path(scratch) / "adapters", ADAPTERS)
        names = [folder.name for folder in folders]
        found: dict[str, float] = {}
        for rows in (8, 32):
            bare, full, mixed = (_harness(folders) for folders in ([], folders, folders))
            steps = {
                "bare": _decode(bare, [], rows),
                "base": _decode(full, [], rows),
                "mixed": _decode(mixed, names, rows),
                "products": _products(rows),
            }
            least = _least(steps, rounds)
            found[f"decode of {rows}: {ADAPTERS} adapters over the base"] = least["mixed"] / least["base"]
            found[f"decode of {rows}: the base with {ADAPTERS} loaded over none"] = least["base"] / least["bare"]
            if rows == 32:  # at 8 both wait for memory, whose speed is that of the whole machine
                found[f"decode of {rows}: the base over its products in torch"] = least["bare"] / least["products"]
        harness = _harness(folders)
        steps = {"base": _prefill(harness, None), "adapter": _prefill(harness, names[1])}
        least = _least({**steps, "products": _products(_PREFILL_TOKENS)}, rounds)
        found[f"prefill of {_PREFILL_TOKENS}: an adapter over the base"] = least["adapter"] / least["base"]
        found[f"prefill of {_PREFILL_TOKENS}: the base over its products in torch"] = least["base"] / least["products"]
    return found


def _harness(folders: Sequence[Path]) -> Harness:
    harness = Harness(
        tiny_llama(**_SHAPE).bfloat16().eval(),
        blocks=512,
        block_size=16,
        rows=1200,
        arena_bytes=32 << 20,
        threads=1,  # a second one's waiting would count as work
    )
    for folder in folders:
        harness.load(folder.name, folder)
    return harness


def _least(steps: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """They take turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # what the one before left in the caches is none of its time
            times[name].append(step())
    return {name: min(taken) for name, taken in times.items()}


def losses(found: Mapping[str, float], expected: Mapping[str, float]) -> list[str]:
    """What became slower than is allowed, or is not measured any more."""
    said = []
    for what, before in expected.items():
        if what not in found:
            said.append(f"{what}: not measured any more; record the figures again")
        elif found[what] > before * (1 + MOST_LOSS):
            said.append(f"{what}: {found[what]:.3f}, recorded was {before:.3f}, {MOST_LOSS:.0%} more is allowed")
    return said


def expected_here(file: Path) -> dict[str, float] | None:
    """The latest figures of this kind of processor, or None."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    here = [line["results"] for line in lines if line["machine"]["cpu"] == Machine.here().cpu]
    return here[-1] if here else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="regression", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON lines to append to; without it the figures are only printed")
    options = parser.parse_args(argv)
    head = surroundings("torch", "transformers")
    found = measure()
    line: dict[str, Any] = {
        **head,
        "results": {what: round(ratio, 4) for what, ratio in found.items()},
    }
    print(json.dumps(line["results"]))
    if options.out is not None:
        append(options.out, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
