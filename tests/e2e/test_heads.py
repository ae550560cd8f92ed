"""What heads say over HTTP is what vbll says of transformers' hidden states, whatever shares the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.e2e.headed import HEADS, PLAIN, Headed, close
from tests.support.heads import vbll_layer

TEXTS = ("the quick brown fox", "jumps over the lazy dog, and then", "one two three: 1, 2", "a", "fox, too. " * 12)
CASES = [(name, text) for text in TEXTS for name in HEADS]


def completion(headed: Headed, name: str, text: str) -> dict[str, Any]:
    answer = headed.server.complete(model=name, prompt=text, max_tokens=1, uncertainty=True)
    said: dict[str, Any] = answer["choices"][0]["uncertainty"]
    return said


def at_the_end(headed: Headed, name: str, text: str) -> dict[str, Any]:
    """Of a longer answer, a sampled one: the head reads the prompt alone."""
    answer = headed.server.complete(model=name, prompt=text, max_tokens=9, n=2, temperature=1, uncertainty=True)
    first, second = (choice["uncertainty"] for choice in answer["choices"])
    assert first == second
    return dict(first)


def without_a_token(headed: Headed, name: str, text: str) -> dict[str, Any]:
    answer = headed.server.complete(model=name, prompt=text, max_tokens=0, echo=True, logprobs=0, uncertainty=True)
    return dict(answer["choices"][0]["uncertainty"])


def classification(headed: Headed, name: str, text: str) -> dict[str, Any]:
    answer = headed.server.post("/v1/classify", {"model": name, "input": text, "uncertainty": True}).json()
    row = answer["data"][0]
    assert (row["index"], row["num_classes"], answer["model"]) == (0, len(HEADS[name].labels), name)
    assert row["probs"] == row["uncertainty"]["probabilities"]
    assert row["label"] == row["uncertainty"]["label"]
    assert answer["usage"]["prompt_tokens"] == len(headed.ids(text))
    return dict(row["uncertainty"])


WAYS: tuple[Callable[[Headed, str, str], dict[str, Any]], ...] = (
    completion,
    at_the_end,
    without_a_token,
    classification,
)


def test_a_mixed_batch_is_each_alone(headed: Headed) -> None:
    """Eighty requests at once: four heads in four ways, beside an adapter without a head and the base."""

    def others(name: str) -> None:
        headed.server.complete(model=name, prompt=TEXTS[1], max_tokens=20)

    with ThreadPoolExecutor(24) as pool:
        beside = [pool.submit(others, name) for name in (PLAIN, "tiny") for _ in range(6)]
        asked = [(case, pool.submit(way, headed, *case)) for case in CASES for way in WAYS]
        for (name, text), answer in asked:
            headed.check(name, headed.ids(text), answer.result())
        for one in beside:
            one.result()


@pytest.mark.parametrize("name", ["dense", "tenant/diagonal"])
def test_the_package_itself_draws_the_same(headed: Headed, name: str) -> None:
    """vbll on transformers' feature, by 100,000 of its own samples."""
    ids = headed.ids(TEXTS[0])
    torch.manual_seed(1)
    with torch.no_grad():
        found_1C = vbll_layer(HEADS[name]).predictive(headed.feature(name, ids).double()[None], n_samples=100_000)
    said = completion(headed, name, TEXTS[0])
    spread = said["probabilities"].values()
    assert list(spread) == pytest.approx(found_1C[0].tolist(), abs=5e-3)
    assert said["epistemic"] > 0.01, "or the head's covariance would not matter"


def test_samples_are_drawn_by_the_seed(headed: Headed) -> None:
    def sampled(samples: int, seed: int | None, way: str = "/v1/completions") -> list[float]:
        given = {"prompt": TEXTS[0], "max_tokens": 1} if way == "/v1/completions" else {"input": TEXTS[0]}
        body = {"model": "dense", "uncertainty": {"samples": samples}, "seed": seed, **given}
        answer = headed.server.post(way, body).json()
        rows = answer["choices"] if way == "/v1/completions" else answer["data"]
        return list(rows[0]["uncertainty"]["probabilities"].values())

    exact = completion(headed, "dense", TEXTS[0])
    assert sampled(20, 1) == sampled(20, 1) == sampled(20, 1, "/v1/classify")
    assert sampled(20, 1) != sampled(20, 2)
    assert sampled(20, None) != sampled(20, None)
    assert sampled(20, 1) != list(exact["probabilities"].values())
    many = sampled(100_000, -(2**70))
    assert many == pytest.approx(list(exact["probabilities"].values()), abs=5e-3)


def test_many_inputs_in_one_request(headed: Headed) -> None:
    texts = [f"{text} {number}" for number in range(20) for text in TEXTS]
    answer = headed.server.post("/v1/classify", {"model": "dense", "input": texts}).json()
    assert [row["index"] for row in answer["data"]] == list(range(100))
    assert all("uncertainty" not in row for row in answer["data"]), "it was not asked for"
    for text, row in list(zip(texts, answer["data"], strict=True))[::9]:
        close(list(row["probs"].values()), headed.expected("dense", headed.ids(text)).p_C.tolist())


def test_a_gate_less_mixture_has_no_head(headed: Headed) -> None:
    """A head is trained under its adapter alone, so a sum of adapters answers by its logits."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "adapters": [{"name": "dense", "weight": 1.0}]}
    said = headed.server.complete(**body, uncertainty=True)["choices"][0]["uncertainty"]
    assert (said["method"], said["calibrated"]) == ("logprob", False)


def test_models_say_what_they_can(headed: Headed) -> None:
    models = headed.server.models
    for name, head in HEADS.items():
        method = "softmax" if name == "softmax" else "vbll"
        assert models[name]["adapter"]["uncertainty"] == {
            "methods": [method, "logprob"],
            "levels": {method: ["sequence"], "logprob": ["sequence", "token"]},
            "calibrated": name == "judge",
            "version": head.digest,
            "labels": list(head.labels),
            "bytes": head.bytes,
        }
    assert models[PLAIN]["adapter"]["uncertainty"] == {
        "methods": ["logprob"],
        "levels": {"logprob": ["sequence", "token"]},
        "calibrated": False,
    }


def test_one_version_is_asked_by_its_own_head(headed: Headed) -> None:
    version = headed.server.models["dense"]["adapter"]["version"]
    asked = f"dense@{version[:12]}"
    headed.check("dense", headed.ids(TEXTS[0]), completion(headed, asked, TEXTS[0]))
    choices = [{"value": value} for value in ("blue", "red", "green")]
    question = {"type": "choice", "instructions": "", "choices": choices}
    for path, body in (
        ("/v1/classify", {"input": TEXTS[0]}),
        ("/v1/decisions", {"input": TEXTS[0], "questions": [question]}),
    ):
        answer = headed.server.post(path, {"model": asked, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["adapter"] == {"name": "dense", "version": version}
        assert answer.headers["X-Motet-Adapter"] == f"dense@{version}"


def test_a_new_head_is_a_new_version(headed: Headed) -> None:
    """Loaded in place, while the old one answers."""
    folder = headed.folders["dense"]
    file = folder / "uncertainty_head.json"
    before = headed.server.models["dense"]["adapter"]
    old = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(old), "temperature": 8.0}))
        assert headed.server.load("dense", folder, load_inplace=True).status_code == 200
        after = headed.server.models["dense"]["adapter"]
        assert before["version"] != after["version"]
        assert before["uncertainty"]["version"] != after["uncertainty"]["version"]
        flatter = completion(headed, "dense", TEXTS[0])
        assert flatter["version"] == after["uncertainty"]["version"]
        assert flatter["total"] > headed.expected("dense", headed.ids(TEXTS[0])).total + 0.01
    finally:
        file.write_text(old)
        assert headed.server.load("dense", folder, load_inplace=True).status_code == 200
    assert headed.server.models["dense"]["adapter"]["version"] == before["version"]
    headed.check("dense", headed.ids(TEXTS[0]), completion(headed, "dense", TEXTS[0]))
