"""What a base in int8 costs in quality: log-probabilities of real texts against those of the exact base.

With the base alone and with example adapters, whose own weights stay exact. Both bases compute natively in bfloat16 and
see the same tokens; positions are those after the first of every text. Run it from the repository root:

    python -m tests.bench.int8 --out docs/results/int8-cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.server.engine.types import Applied, BlockId, GenerationId, Sampling, Span
from motet.server.model.batch import token_tensors
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from tests.bench.lines import append, surroundings
from tests.support.harness import Harness

EXAMPLES = Path("examples") / "adapters"
SETS = {"gsm8k.test": ("question", "answer"), "wikisql.test": ("question", "sql")}
"""File → what the user says and what is answered."""
CASES = (("gsm8k.test", None), ("wikisql.test", None), ("wikisql.test", "wikisql"), ("wikisql.test", "wikisql-pissa"))
ROWS, BLOCK_SIZE, LONGEST = 100, 16, 512


@dataclass(frozen=True)
class Quality:
    """Of one set of texts and one adapter, or the base; logarithms are natural.

    Attributes:
        exact, int8: mean loss of a token.
        difference, standard_error: of the loss of a token, mean over texts.
        divergence: mean Kullback-Leibler divergence of int8's next-token distribution from the exact one.
        same_token: share of positions where both find the same token most likely.
    """

    texts: str
    adapter: str | None
    positions: int
    exact: float
    int8: float
    difference: float
    standard_error: float
    divergence: float
    same_token: float


class Base:
    """The default model, exact or in int8, and the example adapters."""

    def __init__(self, folder: Path, *, int8: bool) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._harness = Harness(model, blocks=LONGEST // BLOCK_SIZE, block_size=BLOCK_SIZE, int8=int8)
        for name in {adapter for _, adapter in CASES if adapter is not None}:
            self._harness.load(name, EXAMPLES / name)

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], adapter: str | None) -> torch.Tensor:
        """[T - 1, V] of the tokens from the second on."""
        loaded, registry = self._harness.loaded, self._harness.registry
        lease = None if adapter is None else registry.acquire(adapter)
        blocks = tuple(BlockId(i) for i in range(-(-len(tokens) // BLOCK_SIZE)))
        applied = () if lease is None else (Applied(lease),)
        span = Span(GenerationId(0), applied, tuple(tokens), 0, blocks, False, Sampling(max_tokens=1), 0)
        assert loaded.native is not None
        assert loaded.attention.cache is not None
        changes = self._harness.effects.build([span])
        assert adapter is None or self._harness.effects.division.modules_only(span) is None
        rows = torch.arange(len(tokens) - 1)
        inputs = token_tensors([span], loaded.device)
        logits = loaded.native.forward([span], loaded.attention.cache, *inputs, rows, changes)
        if lease is not None:
            registry.release(lease)
        return logits.double().log_softmax(-1)


def texts(data: Path, name: str, tokenizer: Any) -> list[list[int]]:
    """The first conversations of a set, as the chat template writes them."""
    lines = (data / "text" / f"{name}.jsonl").read_text().splitlines()[:ROWS]
    asked, told = SETS[name]
    found = []
    for row in map(json.loads, lines):
        chat = [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[told]}]
        found.append(list(tokenizer.apply_chat_template(chat, return_dict=False))[:LONGEST])
    return found


def measure(exact: Base, int8: Base, name: str, adapter: str | None, rows: Sequence[Sequence[int]]) -> Quality:
    """Over all positions of the texts."""
    losses: dict[str, list[float]] = {"exact": [], "int8": []}
    differences, divergence, same, positions = [], 0.0, 0, 0
    for tokens in rows:
        targets = torch.tensor(tokens[1:])[:, None]
        expected, actual = exact.logprobs(tokens, adapter), int8.logprobs(tokens, adapter)
        of_exact, of_int8 = (-one.gather(1, targets).squeeze(1) for one in (expected, actual))
        losses["exact"] += of_exact.tolist()
        losses["int8"] += of_int8.tolist()
        differences.append(float((of_int8 - of_exact).mean()))
        divergence += float((expected.exp() * (expected - actual)).sum())
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        positions += len(targets)
    return Quality(
        texts=name,
        adapter=adapter,
        positions=positions,
        exact=round(fmean(losses["exact"]), 4),
        int8=round(fmean(losses["int8"]), 4),
        difference=round(fmean(differences), 4),
        standard_error=round(stdev(differences) / len(differences) ** 0.5, 4),
        divergence=round(divergence / positions, 5),
        same_token=round(same / positions, 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact, int8 = Base(folder, int8=False), Base(folder, int8=True)
    head = surroundings("torch", "transformers")
    found = []
    for name, adapter in CASES:
        found.append(measure(exact, int8, name, adapter, texts(options.data, name, tokenizer)))
        print(*asdict(found[-1]).values(), flush=True)
    line = {
        "label": "int8",
        **head,
        "arguments": {"model": DEFAULT_MODEL_NAME, "dtype": "bfloat16", "rows": ROWS},
        "results": [asdict(one) for one in found],
    }
    if options.out is not None:
        append(options.out, line)


if __name__ == "__main__":
    main()
