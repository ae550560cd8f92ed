"""What a user's gate costs on admission: computed for each request by itself, as it is served, and for all at once.

Beside it stands what one prompt of iLoRA's length costs on the default model, and whether a user's factors keep their
bits in company: key-value blocks are shared between requests of equal factors. Run it from the repository root:

    OMP_NUM_THREADS=1 python -m tests.bench.router --out docs/results/router-cpu.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from motet.adapters.gates.instance import InstanceGate, UserInput
from motet.adapters.methods import lower
from motet.adapters.source import read
from motet.adapters.spec import NOTHING_DECLARED
from motet.server.model.default_model import ensure_default_model
from tests.bench.lines import append, surroundings
from tests.support.bases import base_of
from tests.support.layouts_ilora import ilora
from tests.support.models import load_dense, tiny_llama
from tests.support.tolerances import TOLERANCES

WAITING = (1, 8, 64)
WARM_UPS, ROUNDS, PROMPT_TOKENS = 3, 41, 120


@dataclass(frozen=True)
class Cost:
    """Of so many requests that wait at the same moment; microseconds of CPU time per request, the fewest of the rounds.

    Attributes:
        served_us: each in a thread of the pool, as requests are served.
        alone_us: one after the other in one thread.
        together_us: one batch of the networks.
        same_bits: how many have in the batch the factors that they have alone.
    """

    waiting: int
    served_us: float
    alone_us: float
    together_us: float
    same_bits: int


def gate() -> InstanceGate:
    """SASRec and router of the official size, with random weights."""
    model = tiny_llama()
    with tempfile.TemporaryDirectory() as folder:
        lowered = lower(read(ilora(model, Path(folder) / "users").folder, NOTHING_DECLARED), base_of(model))
    assert lowered.gate is not None
    return InstanceGate(lowered.gate)


def measure(gate: InstanceGate, waiting: int) -> Cost:
    """All three ways in turn."""
    chance = random.Random(waiting)
    histories = [
        [chance.randrange(gate.items) for _ in range(chance.randint(1, gate.history_length))] for _ in range(waiting)
    ]
    users = [UserInput(history=history) for history in histories]

    def together() -> torch.Tensor:
        return gate._router.factors(gate._sasrec.states(histories))

    async def served() -> None:
        await asyncio.gather(*(asyncio.to_thread(gate.factors, [user]) for user in users))

    with asyncio.Runner() as runner:
        ways: list[Callable[[], object]] = [lambda: runner.run(served()), lambda: gate.factors(users), together]
        times: list[list[float]] = [[], [], []]
        for _ in range(WARM_UPS + ROUNDS):
            for way, taken in zip(ways, times, strict=True):
                taken.append(_once_us(way) / waiting)
    alone_NK, together_NK = gate.factors(users), together()
    TOLERANCES["gate factors", torch.float32].assert_close(together_NK, alone_NK)
    fewest = (round(min(taken[WARM_UPS:]), 1) for taken in times)
    return Cost(waiting, *fewest, int((alone_NK == together_NK).all(1).sum()))


def prompt_us() -> float:
    """The forward of one prompt on the default model in float32, plain transformers: CPU time, the least of all."""
    model = load_dense(ensure_default_model(), torch.float32)
    ids = torch.randint(3, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        times = [_once_us(lambda: model(input_ids=ids, logits_to_keep=1)) for _ in range(WARM_UPS + 11)]
    return round(min(times[WARM_UPS:]), 0)


def _once_us(call: Callable[[], object]) -> float:
    """CPU time of all threads: other jobs share the machine."""
    began_ns = time.process_time_ns()
    call()
    return (time.process_time_ns() - began_ns) / 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head = surroundings("torch")
    networks = gate()
    line = {
        **head,
        "arguments": {"threads": 1, "rounds": ROUNDS, "prompt_tokens": PROMPT_TOKENS},
        "costs": [asdict(measure(networks, waiting)) for waiting in WAITING],
        "prompt_us": prompt_us(),
    }
    append(options.out, line)
    print(*line["costs"], line["prompt_us"], sep="\n")


if __name__ == "__main__":
    main()
