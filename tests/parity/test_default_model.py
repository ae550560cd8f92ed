"""The default model with the example adapters: what `make serve` serves, against PEFT and generate()."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.server.model.default_model import ensure_default_model
from tests.support.harness import GREEDY, Harness
from tests.support.tolerances import TOLERANCES

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
FOLDERS = sorted(config.parent for config in EXAMPLES.glob("*/adapter_config.json"))
QUESTIONS = (
    "What is the highest number of points when the home team is Essendon?",
    "Is EECS 484 offered in the Winter of 2017?",
    "Is confectioners' sugar the same as powdered sugar?",
)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def requests_(model_folder: Path) -> list[tuple[list[int], str | None]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    made: list[tuple[list[int], str | None]] = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made += [(prompt, name) for name in [None, *(folder.name for folder in FOLDERS)]]
    return made


def _model(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _harness(folder: Path, dtype: torch.dtype) -> Harness:
    harness = Harness(_model(folder, dtype), arena_bytes=128 << 20, block_size=16, rows=512)
    for adapter in FOLDERS:
        harness.load(adapter.name, adapter)
    return harness


def _peft(folder: Path, dtype: torch.dtype) -> Any:
    model = _model(folder, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in FOLDERS:
            if isinstance(model, PeftModel):
                model.load_adapter(adapter, adapter.name)
            else:
                model = PeftModel.from_pretrained(model, adapter, adapter_name=adapter.name)
    return model.eval()


@torch.no_grad()
def _expected(peft: Any, requests: list[tuple[list[int], str | None]]) -> torch.Tensor:
    """[requests, V] after each prompt, each alone, by `set_adapter`."""
    rows = []
    for prompt, name in requests:
        tokens = torch.tensor([prompt])
        if name is None:
            with peft.disable_adapter():
                rows.append(peft(input_ids=tokens).logits[0, -1].float())
        else:
            peft.set_adapter(name)
            rows.append(peft(input_ids=tokens).logits[0, -1].float())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def peft32(model_folder: Path) -> Any:
    return _peft(model_folder, torch.float32)


def test_there_are_three_clearly_different_examples() -> None:
    assert len(FOLDERS) >= 3
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in FOLDERS]
    kinds = {
        (config["use_dora"], config["use_rslora"], config["r"], len(config["target_modules"])) for config in configs
    }
    assert len(kinds) == len(FOLDERS)


@pytest.mark.slow
def test_float32_logits_and_tokens_equal_peft(
    model_folder: Path, requests_: list[tuple[list[int], str | None]], peft32: Any
) -> None:
    harness = _harness(model_folder, torch.float32)
    end = harness.loaded.end_tokens
    made = harness.run(requests_, replace(GREEDY, max_tokens=12, stop_token_ids=end))
    actual = torch.stack([result.logits[0] for result in made])
    TOLERANCES["logits", torch.float32].assert_close(actual, _expected(peft32, requests_))
    for (prompt, name), result in list(zip(requests_, made, strict=True))[: len(FOLDERS) + 1]:
        tokens = torch.tensor([prompt])
        options: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": 12,
            "do_sample": False,
        }
        if name is None:
            with peft32.disable_adapter():
                expected = peft32.generate(**options)
        else:
            peft32.set_adapter(name)
            expected = peft32.generate(**options)
        assert result.tokens == expected[0, len(prompt) :].tolist(), name


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_peft_is(
    model_folder: Path, requests_: list[tuple[list[int], str | None]], peft32: Any
) -> None:
    """bfloat16 has no exact answer to compare with; what can be asked is not to be further off than the oracle is."""
    exact = _expected(peft32, requests_)
    theirs = (_expected(_peft(model_folder, torch.bfloat16), requests_) - exact).square().mean(1).sqrt()
    ours = (_harness(model_folder, torch.bfloat16).logits(requests_) - exact).square().mean(1).sqrt()
    assert float(theirs.max()) > 0
    ratio = float(ours.mean() / theirs.mean())
    assert ratio <= TOLERANCES["bfloat16 error over PEFT's", torch.bfloat16].rtol, f"{ratio:.2f}"
