"""A base in int8 answers, with adapters and without, as transformers and PEFT do over weights that torch rounded.

The adapters themselves stay as exact as they are: DoRA's scales are those of the weights it was trained on.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.support.harness import Harness, Using
from tests.support.int8 import round_linears
from tests.support.models import ALL_LINEARS, save_peft, tiny_gemma3, tiny_llama, tiny_qwen2
from tests.support.tolerances import TOLERANCES

PROMPTS = [[5, 9, 33, 7, 120], [8], [3] * 40, [17, 18], [99, 98, 97]]
USING: list[Using] = [None, "wide", "wide", None, "narrow"]


@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2, tiny_gemma3])
def test_logits_are_those_over_the_rounded_weights(family: Any, tmp_path: Path) -> None:
    model = family()
    folders = {
        "wide": save_peft(model, tmp_path / "wide", LoraConfig(r=16, target_modules=ALL_LINEARS), 1),
        "narrow": save_peft(model, tmp_path / "narrow", LoraConfig(r=3, target_modules=["q_proj"]), 2),
    }
    harness = Harness(copy.deepcopy(model), int8=True)
    for name, folder in folders.items():
        harness.load(name, folder)
    actual = harness.logits(list(zip(PROMPTS, USING, strict=True)))

    round_linears(model)
    for prompt, using, logits in zip(PROMPTS, USING, actual, strict=True):
        served = model if using is None else PeftModel.from_pretrained(copy.deepcopy(model), folders[str(using)])
        with torch.no_grad():
            expected = served.eval()(torch.tensor([prompt])).logits[0, -1]
        TOLERANCES["logits", torch.float32].assert_close(logits, expected)


def test_what_adapters_are_lowered_against_stays_exact() -> None:
    model = tiny_llama()
    original = {path: parameter.clone() for path, parameter in model.named_parameters(remove_duplicate=False)}
    exact, rounded = Harness(copy.deepcopy(model)).loaded, Harness(model, int8=True).loaded
    assert rounded.base.fingerprint == exact.base.fingerprint
    for path, values in original.items():
        assert torch.equal(rounded.base.parameter(path), values), path
