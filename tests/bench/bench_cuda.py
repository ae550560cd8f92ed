"""What a CUDA device makes of Motet: decode steps of Llama shapes, the low-rank product against its bound, its tiles.

Appends one JSON line per figure. `--dry` runs everything at toy sizes under Triton's interpreter, on the CPU:

    python -m tests.bench.bench_cuda --out docs/results/cuda-h200.jsonl
    TRITON_INTERPRET=1 python -m tests.bench.bench_cuda --dry --out /dev/null
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.cuda import decode, low_rank
from tests.bench.cuda.timing import copy_bytes_per_s
from tests.bench.lines import append, surroundings

RANK = 16


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        products: widths (in, out) of a target, rows, adapters.
        tiles: choices of rows, in and out block.
    """

    shapes: Sequence[decode.Shape]
    batches: Sequence[int]
    adapters: int
    products: Sequence[tuple[tuple[int, int], int, int]]
    tiles: Sequence[tuple[int, int, int]]
    copy_bytes: int
    rounds: int


FULL = Sizes(
    shapes=decode.SHAPES,
    batches=(1, 32, 128),
    adapters=64,
    products=[
        (widths, rows, 64) for widths in ((576, 1536), (4096, 4096), (4096, 14_336)) for rows in (1, 32, 128, 2048)
    ],
    tiles=low_rank.all_choices(),
    copy_bytes=1 << 30,
    rounds=50,
)
DRY = Sizes(
    shapes=(decode.TOY,),
    batches=(1, 3),
    adapters=2,
    products=[((32, 48), 3, 2)],
    tiles=[(16, 32, 64), (32, 64, 64)],
    copy_bytes=1 << 10,
    rounds=1,
)


def figures(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and figure, as they are found."""
    bound = copy_bytes_per_s(device, sizes.copy_bytes, sizes.rounds)
    yield "copy", {"bytes_per_s": bound}
    for widths, rows, adapters in sizes.products:
        yield "low_rank", asdict(low_rank.product(widths, rows, adapters, RANK, device, bound, sizes.rounds))
        found = low_rank.tiles(widths, rows, adapters, RANK, device, sizes.tiles, sizes.rounds)
        yield "tiles", {"widths": widths, "rows": rows, "adapters": adapters, "choices": [asdict(one) for one in found]}
    for shape in sizes.shapes:
        for step in decode.steps(shape, sizes.batches, sizes.adapters, RANK, device, sizes.rounds):
            yield "decode", asdict(step)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU; the figures mean nothing")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to append to")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        print("nothing measured: torch sees no CUDA device; --dry tries the script without one", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    name = "dry" if options.dry else torch.cuda.get_device_name(device)
    head = surroundings("torch", "triton", "transformers")
    for kind, figure in figures(DRY if options.dry else FULL, device):
        append(options.out, {"kind": kind, **head, "device": name, "results": figure})
        print(kind, json.dumps(figure)[:200], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
