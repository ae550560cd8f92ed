"""Greedy answers of PEFT in float32, and what may be said instead of each token. Reads and writes JSON.

In:  {"model": folder, "adapters": {name: folder}, "base": name, "prompts": [[id]], "tokens": n, "gap": nats}
Out: [{"model": name, "prompt": [id], "tokens": [text], "instead": [[text]]}], `instead` within the gap of the best.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.peers.peft_program import greedy, with_adapters

_NEAR = 20


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int, gap: float) -> list[dict[str, Any]]:
    """Of prompts of one length: the tokens, and the texts of those within the gap of the best."""
    ids = torch.tensor(prompts)
    out = model.generate(**greedy(ids, tokens), return_dict_in_generate=True, output_logits=True)
    made = []
    for row, prompt in enumerate(prompts):
        instead = []
        for logits_nV in out.logits:
            best = logits_nV[row].topk(_NEAR)
            near = [int(i) for i, value in zip(best.indices, best.values, strict=True) if best.values[0] - value <= gap]
            instead.append([tokenizer.decode([token]) for token in near])
        said = out.sequences[row, len(prompt) :].tolist()
        made.append({"prompt": prompt, "tokens": [tokenizer.decode([token]) for token in said], "instead": instead})
    return made


def main() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(1)  # float32 gains nothing from a second one here
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    base: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()

    def of(name: str, model: Any) -> list[dict[str, Any]]:
        made = answers(model, tokenizer, asked["prompts"], asked["tokens"], asked["gap"])
        return [{"model": name, **each} for each in made]

    found = of(asked["base"], base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's matter
        adapted = with_adapters(base, [Path(folder) for folder in asked["adapters"].values()])
    for name, folder in asked["adapters"].items():
        adapted.set_adapter(Path(folder).name)
        found += of(name, adapted)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
