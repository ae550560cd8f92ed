"""PEFT's mixed batch, without a server: reads cells, one JSON line each, and answers how long their batch took.

A batch is one call of `generate`; the base's is that of plain transformers, so its cells must come first. Run as a
module: the first line that it reads says which model and adapters.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.bench.peers.cells import OUTPUT_TOKENS, PROMPT_TOKENS
from tests.bench.prompts import PromptShape


def prompts(seed: int, count: int) -> torch.Tensor:
    """[count, prompt tokens]: the first prompts that a server gets for this seed."""
    shape = PromptShape(PROMPT_TOKENS)
    return torch.tensor([shape.build(seed, f"measured/{index}") for index in range(count)])


def greedy(ids: torch.Tensor, tokens: int) -> dict[str, Any]:
    """What `generate` is told for so many most likely tokens, ends of text included."""
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "pad_token_id": 0,
    }


@torch.inference_mode()
def batch_s(model: Any, ids: torch.Tensor, tokens: int, adapters: list[str]) -> float:
    """Seconds of one batch whose rows take the adapters in turn; of the base where there are none."""
    mixed = {"adapter_names": [adapters[row % len(adapters)] for row in range(len(ids))]} if adapters else {}
    began_s = time.perf_counter()
    out = model.generate(**greedy(ids, tokens), **mixed)
    took_s = time.perf_counter() - began_s
    assert out.shape == (len(ids), ids.shape[1] + tokens), f"{tuple(out.shape)}"
    return took_s


def with_adapters(model: Any, folders: list[Path]) -> Any:
    """The model with every adapter, each named as its folder."""
    first, *others = folders
    adapted = PeftModel.from_pretrained(model, str(first), adapter_name=first.name, autocast_adapter_dtype=False)
    for folder in others:
        adapted.load_adapter(str(folder), adapter_name=folder.name, autocast_adapter_dtype=False)
    return adapted.eval()


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    folders = [Path(folder) for folder in asked["adapters"]]
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.bfloat16).eval()
    adapted = None
    batch_s(model, prompts(0, 2), 2, [])
    print(json.dumps({"torch_threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        cell = json.loads(line)
        names = [folder.name for folder in folders[: cell["adapters"]]]
        if names and adapted is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's matter
                adapted = with_adapters(model, folders)
        batch_s(adapted or model, prompts(0, 2), 2, names)
        took_s = batch_s(adapted or model, prompts(cell["seed"], cell["concurrency"]), OUTPUT_TOKENS, names)
        print(json.dumps({"duration_s": took_s}), flush=True)


if __name__ == "__main__":
    main()
