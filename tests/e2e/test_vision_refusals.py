"""What a vision base refuses, and what a language model refuses of images: the field is named, nothing is ignored."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.e2e.process import Server
from tests.e2e.test_vision import PATH, examples
from tests.e2e.vision import Vision
from tests.support.vision import data_url, picture

URL = data_url(picture(1))
EXAMPLES = examples()


def refused(server: Server, path: str, body: dict[str, Any], status: int, field: str | None, says: str = "") -> None:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, answer.text
    assert says in error["message"]


CLASSIFY: list[tuple[dict[str, Any], int, str, str]] = [
    ({"input": []}, 400, "input", "input has 0 images"),
    ({"input": [URL] * 257}, 400, "input", "input has 257 images; at most 256"),
    ({"input": "a text"}, 400, "input.0", "no data URL; nothing is fetched"),
    ({"input": [URL, "https://example.org/a.png"]}, 400, "input.1", "nothing is fetched"),
    ({"input": [URL, {"image": "http://127.0.0.1/a.png"}]}, 400, "input.1", "nothing is fetched"),
    ({"input": {"image": URL.replace("png", "webp")}}, 400, "input.0", "image/png and image/jpeg"),
    ({"input": {"image": URL[:-40]}}, 400, "input.0", "cannot be decoded"),
    ({"input": {"image": ""}}, 400, "input.image", ""),
    ({"input": {"image": URL, "detail": "high"}}, 400, "input.detail", "unknown field"),
    ({"input": {"url": URL}}, 400, "input.image", "required"),
    ({"input": 3}, 400, "input", ""),
    ({"input": URL, "model": "nobody"}, 404, "model", "'nobody'"),
    ({"input": URL, "model": "pool@merge-0"}, 404, "model", "'pool@merge-0'"),
    ({"input": URL, "model": "pool"}, 400, "gate", "merge it first"),
    ({"input": URL, "invented": 1}, 400, "invented", "unknown field"),
]


@pytest.mark.parametrize(("change", "status", "field", "says"), CLASSIFY)
def test_impossible_classifications(vision: Vision, change: dict[str, Any], status: int, field: str, says: str) -> None:
    refused(vision.server, "/v1/classify", {"model": "narrow", **change}, status, field, says)


MERGES: list[tuple[dict[str, Any], str, str]] = [
    ({"text": "a", "label": "x"}, "support.7.text", "is a text; the base model takes images"),
    ({"text": URL, "label": "x"}, "support.7.text", "takes images"),
    ({"label": "x"}, "support.7", "one of text and image"),
    ({"text": "a", "image": URL, "label": "x"}, "support.7", "one of text and image"),
    ({"image": URL}, "support.7.label", ""),
    ({"image": "", "label": "x"}, "support.7.image", ""),
    ({"image": "https://example.org/a.png", "label": "x"}, "support.7.image", "nothing is fetched"),
    ({"image": URL[:-40], "label": "x"}, "support.7.image", "cannot be decoded"),
]


@pytest.mark.parametrize(("example", "field", "says"), MERGES)
def test_impossible_supports(vision: Vision, example: dict[str, Any], field: str, says: str) -> None:
    refused(vision.server, PATH, {"support": [*EXAMPLES, example]}, 400, field, says)


def test_a_support_of_too_many_images(vision: Vision) -> None:
    refused(vision.server, PATH, {"support": EXAMPLES * 37}, 400, "support", "support has 259 images; at most 256")


def test_who_cannot_be_merged(vision: Vision) -> None:
    refused(vision.server, "/v1/adapters/narrow/merges", {"support": EXAMPLES}, 400, "model", "is no pool")
    refused(vision.server, "/v1/adapters/vit/merges", {"support": EXAMPLES}, 404, None)


@pytest.mark.parametrize("model", ["vit", "narrow", "pool", "nobody"])
def test_no_text_is_generated(vision: Vision, model: str) -> None:
    says = "'vit' takes images and generates no text; POST /v1/classify"
    prompt = {"model": model, "prompt": "a"}
    refused(vision.server, "/v1/completions", prompt, 400, "model", says)
    refused(vision.server, "/v1/completions", {**prompt, "merge": {"support": EXAMPLES}}, 400, "model", says)
    messages = [{"role": "user", "content": "a"}]
    refused(vision.server, "/v1/chat/completions", {"model": model, "messages": messages}, 400, "model", says)


def test_golden_values_of_tokens_mean_nothing(vision: Vision) -> None:
    folder = shutil.copytree(vision.folders["dora"], vision.root / "vouched")
    content = {"tolerance": 0.01, "prompts": [{"tokens": [1, 2], "logprobs": [-1.0]}]}
    (folder / "golden.json").write_text(json.dumps(content))
    answer = vision.server.load("vouched", folder)
    assert answer.status_code == 400
    assert "the base model takes images" in answer.json()["error"]["message"]
    assert "vouched" not in vision.server.models


def test_a_language_model_takes_no_images(tiny_server: Server) -> None:
    for given in (URL, [URL], {"image": URL}, ["a", {"image": URL}]):
        field = f"input.{len(given) - 1 if isinstance(given, list) else 0}"
        refused(
            tiny_server, "/v1/classify", {"model": "tiny", "input": given}, 400, field, "the base model takes texts"
        )
    field = "support.0.image"
    refused(tiny_server, "/v1/adapters/tuned/merges", {"support": EXAMPLES}, 400, field, "the base model takes texts")
    body = {"model": "tuned", "prompt": "a", "merge": {"support": EXAMPLES}}
    refused(tiny_server, "/v1/completions", body, 400, f"merge.{field}", "the base model takes texts")
    assert {one["input_modalities"][0] for one in tiny_server.models.values()} == {"text"}
