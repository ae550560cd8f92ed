"""Decode steps of Llama shapes with random weights on a device, of the base and of many adapters.

The runner has no CUDA graphs yet: a step's launches from Python are part of its time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from motet.server.engine.types import Sampling
from tests.bench.cuda.timing import dtype_of, milliseconds
from tests.bench.make_adapters import make_adapters
from tests.support.harness import Harness

_PROMPT_TOKENS, _BLOCK_SIZE, _WARM_UPS = 128, 16, 3


@dataclass(frozen=True)
class Shape:
    """A Llama; `parameters` is what people call it."""

    parameters: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = (
    Shape("135M", 30, 576, 1536, 9, 3, 49_152),
    Shape("1B", 16, 2048, 8192, 32, 8, 128_256),
    Shape("3B", 28, 3072, 8192, 24, 8, 128_256),
    Shape("8B", 32, 4096, 14_336, 32, 8, 128_256),
)
TOY = Shape("toy", 2, 64, 96, 4, 2, 128)


@dataclass(frozen=True)
class Step:
    """A decode step, medians; `overhead` is what the adapters add to the base's."""

    shape: str
    batch: int
    adapters: int
    rank: int
    base_ms: float
    adapters_ms: float
    overhead: float


def steps(
    shape: Shape, batches: Sequence[int], adapters: int, rank: int, device: torch.device, rounds: int
) -> list[Step]:
    """Every batch, the two kinds of step in turns on one model."""
    with tempfile.TemporaryDirectory() as scratch:
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        config.save_pretrained(scratch)
        folders = make_adapters(scratch, Path(scratch) / "adapters", adapters, ranks=(rank,))
        with device:
            model = LlamaForCausalLM(config).to(dtype_of(device)).eval()
        bytes_ = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        length = _PROMPT_TOKENS + _WARM_UPS + rounds + 8
        harness = Harness(
            model,
            backend="triton",
            blocks=2 * max(batches) * -(-length // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            rows=2 * max(batches) * _PROMPT_TOKENS,
            generations=2 * max(batches),
            arena_bytes=2 * bytes_,
            host_bytes=2 * bytes_,
        )
        for folder in folders:
            harness.load(folder.name, folder)
        names = [folder.name for folder in folders]
        return [_step(harness, shape, batch, names, rank, device, rounds) for batch in batches]


def _step(
    harness: Harness, shape: Shape, batch: int, names: Sequence[str], rank: int, device: torch.device, rounds: int
) -> Step:
    """The base's rows first, to their end, then the adapters'."""
    took_ms = {}
    for kind, using in (("base", [None]), ("adapters", names)):
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(3, shape.vocabulary, (batch, _PROMPT_TOKENS), generator=generator).tolist()
        requests = [(prompt, using[row % len(using)]) for row, prompt in enumerate(prompts)]
        ids = harness.submit(requests, Sampling(max_tokens=_WARM_UPS + rounds + 2, temperature=0))
        for _ in range(2):  # the prompts, and the first decode step
            harness.engine.step()
        took_ms[kind] = milliseconds({kind: harness.engine.step}, device, rounds, _WARM_UPS)[kind]
        while not all(harness.finished(generation) for generation in ids):
            harness.engine.step()
    overhead = took_ms["adapters"] / took_ms["base"] - 1
    return Step(shape.parameters, batch, len(names), rank, took_ms["base"], took_ms["adapters"], overhead)
