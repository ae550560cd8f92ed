"""A real model of another family, with tied embeddings, sliding windows and one key-value head."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.gemma import gemma3_270m
from tests.support.harness import GREEDY, Harness
from tests.support.models import reference_copy
from tests.support.tolerances import TOLERANCES

PROMPTS = ("The capital of France is", "Water boils at")


@pytest.fixture(scope="module")
def gemma() -> tuple[Harness, Any, list[list[int]]]:
    """The model being served, its untouched copy, and prompts."""
    folder = gemma3_270m()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = reference_copy(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Harness(model, tokenizer), reference, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.mark.slow
def test_base_tokens_equal_generate(gemma: tuple[Harness, Any, list[list[int]]]) -> None:
    harness, reference, prompts = gemma
    made = harness.run([(prompt, None) for prompt in prompts], replace(GREEDY, max_tokens=8))
    for prompt, result in zip(prompts, made, strict=True):
        tokens = torch.tensor([prompt])
        expected = reference.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_public_adapter_has_pefts_logits(gemma: tuple[Harness, Any, list[list[int]]]) -> None:
    """An adapter that somebody else trained and published, as it is."""
    data = Path(os.environ.get("MOTET_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = data / "adapters" / "gemma3-270m-it_logo_r4_qv"
    if not folder.is_dir():
        pytest.skip(f"the public adapter is not here: set MOTET_DATA to a folder with adapters/{folder.name}")
    harness, reference, prompts = gemma
    harness.load("logo", folder)
    actual = harness.logits([(prompts[0], None), (prompts[0], "logo")])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(reference, folder).eval()
        adapted = peft(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
        with peft.disable_adapter():
            base = peft(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
    assert (adapted - base).abs().max() > 1e-3
    TOLERANCES["logits", torch.float32].assert_close(actual, torch.stack([base, adapted]))
