"""A full fine-tune served in a lossy form is the dense model W + Δ̂, built by NumPy, alone and among others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from motet.adapters.spec import Declared, LossyForm
from tests.parity.conftest import Served
from tests.support.lossy import dense
from tests.support.models import VOCABULARY
from tests.support.tolerances import TOLERANCES

FULL = ["full-fine-tune", "lisa", "lisa-frozen-embedding"]
FORMS = ["svd-2", "svd-7", "1bit"]
CASES = [(layout, form) for layout in FULL for form in FORMS]


@pytest.fixture(scope="module")
def oracles(served: Served) -> Iterator[Mapping[str, Any]]:
    """Name → the dense model, of every fine-tune in every form, all of them served."""
    made = {}
    for layout, form in CASES:
        made[f"{layout}:{form}"] = dense(served.reference, served.layouts[layout].oracle, form)
        served.harness.registry.load(
            f"{layout}:{form}", served.layouts[layout].folder, Declared(approximate=LossyForm.parse(form))
        )
    yield made
    for name in made:
        served.harness.registry.unload(name)


@torch.no_grad()
def logits_of(model: Any, prompt: list[int]) -> torch.Tensor:
    """[V] after the prompt."""
    found: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    return found


@pytest.mark.parametrize(("layout", "form"), CASES, ids=map(":".join, CASES))
def test_alone(served: Served, oracles: Mapping[str, Any], layout: str, form: str) -> None:
    prompt = [(7 * i) % VOCABULARY for i in range(3, 30)]
    name = f"{layout}:{form}"
    expected = logits_of(oracles[name], prompt)
    TOLERANCES["logits", torch.float32].assert_close(served.harness.logits([(prompt, name)])[0], expected)
    for other in (served.reference, served.layouts[layout].oracle):  # or the comparison would say nothing
        assert (logits_of(other, prompt) - expected).abs().max() > 100 * TOLERANCES["logits", torch.float32].atol


def test_among_all(served: Served, oracles: Mapping[str, Any]) -> None:
    """With the base, exact fine-tunes, plain, sparse and residual adapters in one batch; two rows of each lossy one."""
    chance = random.Random(17)
    names = [None, *FULL, "lora-all", "dora", "s2ft", "pissa", *oracles, *oracles]
    chance.shuffle(names)
    requests = [([chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 40))], name) for name in names]
    expected = torch.stack(
        [
            logits_of(oracles[name], prompt) if name in oracles else served.expected_logits(prompt, name)
            for prompt, name in requests
        ]
    )
    TOLERANCES["logits", torch.float32].assert_close(served.harness.logits(requests), expected)


@pytest.mark.parametrize(("layout", "form"), CASES, ids=map(":".join, CASES))
def test_the_receipt_says_so(served: Served, oracles: Mapping[str, Any], layout: str, form: str) -> None:
    registry = served.harness.registry
    lossy, exact = registry.get(f"{layout}:{form}"), registry.get(layout)
    assert (lossy.receipt.exact, lossy.receipt.method) == (False, exact.receipt.method)
    assert lossy.receipt.form.endswith(f"approximate={form}")
    assert lossy.version.digest != exact.version.digest
    assert lossy.receipt.resident_bytes < exact.receipt.resident_bytes
    assert lossy.receipt.error is not None
    assert lossy.receipt.error.logprobs is None, "this engine is stepped by hand: nobody measures"
    assert lossy.receipt.error.form == form
    changed = {
        path
        for path, linear in served.reference.named_modules()
        if type(linear) is nn.Linear
        and linear is not served.reference.get_output_embeddings()
        and not torch.equal(linear.weight, served.layouts[layout].oracle.get_submodule(path).weight)
    }
    assert lossy.receipt.error.change.targets.keys() == changed
    assert exact.receipt.error is None
