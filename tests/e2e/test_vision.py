"""Images over HTTP: classified by the base, by adapters and by merges of a pool, each as the model alone would."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from motet.server.api.image_inputs import PLACE, ImageInputs
from tests.e2e.vision import LABELS, LOADED, Vision, images, preprocessed, urls
from tests.support import amt_vit
from tests.support.tolerances import TOLERANCES
from tests.support.vision import data_url, picture

SERVED = TOLERANCES["scores of served features", torch.float32]
PATH = "/v1/adapters/pool/merges"
NAMES = ("red", "blue", "green")
OF_SUPPORT = (0, 1, 0, 2, 1, 2, 2)
"""Which name each example has."""


def support() -> list[Image.Image]:
    return images(len(OF_SUPPORT), first=300)


def examples() -> list[dict[str, str]]:
    return [{"image": url, "label": NAMES[at]} for url, at in zip(urls(support()), OF_SUPPORT, strict=True)]


def made(vision: Vision, **body: Any) -> dict[str, Any]:
    answer = vision.server.post(PATH, {"support": examples(), **body})
    assert answer.status_code == 200, answer.text
    card: dict[str, Any] = answer.json()
    return card


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def means(rows_SD: torch.Tensor) -> list[torch.Tensor]:
    return [
        sum(row for row, own in zip(rows_SD, OF_SUPPORT, strict=True) if own == at) / OF_SUPPORT.count(at)
        for at in range(3)
    ]


def check_probs(data: Sequence[dict[str, Any]], logits: Sequence[torch.Tensor], labels: Sequence[str]) -> None:
    assert [one["index"] for one in data] == list(range(len(logits)))
    for found, logits_C in zip(data, logits, strict=True):
        exponentials = [math.exp(float(value)) for value in logits_C]
        expected = torch.tensor([value / sum(exponentials) for value in exponentials])
        assert list(found["probs"]) == list(labels)
        SERVED.assert_close(torch.tensor(list(found["probs"].values())), expected)
        assert found["label"] == labels[int(logits_C.argmax())]
        assert found["num_classes"] == len(labels)


def test_the_base_and_its_adapters_classify(vision: Vision) -> None:
    """Many requests at once, so that steps mix them; two of the adapters replaced the classifier."""
    several = images(3)
    pixels_NCHW = preprocessed(several)
    asked = [name for name in vision.oracles for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda name: vision.classify(name, urls(several)), asked))
    for name, answer in zip(asked, found, strict=True):
        assert (answer["object"], answer["model"]) == ("list", name)
        logits = [one[1] for one in vision.oracles[name](pixels_NCHW)]
        check_probs(answer["data"], [one for one in logits if one is not None], LABELS)
    assert len({str(answer["data"]) for answer in found}) >= len(vision.oracles), "adapters answer alike"


def test_one_image_in_each_spelling(vision: Vision) -> None:
    image = picture(5)
    expected = vision.classify("narrow", [data_url(image)])
    assert vision.classify("narrow", data_url(image)) == expected
    assert vision.classify("narrow", {"image": data_url(image)}) == expected
    assert vision.classify("narrow", [{"image": data_url(image)}]) == expected
    mixed = vision.classify("narrow", [data_url(image), {"image": data_url(image)}])
    assert [one["label"] for one in mixed["data"]] == [expected["data"][0]["label"]] * 2
    assert vision.classify("narrow", data_url(image, "jpeg", quality=95))["data"][0]["num_classes"] == len(LABELS)


def test_what_is_served(vision: Vision) -> None:
    models = vision.server.models
    assert models.keys() == {"vit", *LOADED}
    for model in models.values():
        assert model["input_modalities"] == ["image"]
        assert model["max_model_len"] is None
    assert models["pool"]["adapter"]["method"] == "amt"
    assert vision.server.http.get("/v1/models/vit").json() == models["vit"]


def scores_of(pool: amt_vit.Official, clean_NCHW: torch.Tensor, seen_NCHW: torch.Tensor, gamma: float) -> list[Any]:
    """(intra, inter, score) of each member, by loops over the official model's features."""
    found = []
    for member in range(3):
        state = pool.merged([float(member == other) for other in range(3)])
        centre, rows_SD = means(amt_vit.features(state, clean_NCHW)), amt_vit.features(state, seen_NCHW)
        intra = inter = 0.0
        for row, own in zip(rows_SD, OF_SUPPORT, strict=True):
            share = 1 / (3 * OF_SUPPORT.count(own))
            intra += share * cosine(row, centre[own])
            inter += share * sum(cosine(row, centre[other]) for other in range(3) if other != own) / 2
        found.append((intra, inter, gamma * intra - (1 - gamma) * inter))
    return found


def check_scores(card: dict[str, Any], expected: list[Any], top_k: int, beta: float) -> None:
    for found, values in zip(card["members"], expected, strict=True):
        SERVED.assert_close(
            torch.tensor([found["intra"], found["inter"], found["score"]]), torch.tensor(values, dtype=torch.float64)
        )
    best = sorted(range(3), key=lambda member: -expected[member][2])[:top_k]
    powers = {member: math.exp(beta * expected[member][2]) for member in best}
    alpha = torch.tensor([powers.get(member, 0) / sum(powers.values()) for member in range(3)])
    SERVED.assert_close(torch.tensor(card["alpha"]), alpha)


def test_members_are_scored_on_the_support(vision: Vision) -> None:
    card = made(vision, top_k=2, beta=3, gamma=0.4)
    assert card["labels"] == list(NAMES)
    pixels_NCHW = preprocessed(support())
    check_scores(card, scores_of(vision.pool, pixels_NCHW, pixels_NCHW, 0.4), 2, 3)


def test_members_are_scored_on_a_view_of_it(vision: Vision) -> None:
    """Compared with class means of the images as they are; the view itself is tested beside its code."""
    inputs = ImageInputs(lambda image: preprocessed([image])[0])

    async def view() -> list[torch.Tensor]:
        prompts = await inputs.read({str(at): url for at, url in enumerate(urls(support()))})
        return [prompt.given[PLACE].values for prompt in await inputs.augmented(prompts, 17)]

    pixels_NCHW, seen_NCHW = preprocessed(support()), torch.stack(asyncio.run(view()))
    card = made(vision, top_k=3, beta=2, seed=17)
    check_scores(card, scores_of(vision.pool, pixels_NCHW, seen_NCHW, 0.6), 3, 2)
    assert made(vision, top_k=3, beta=2, seed=17)["id"] == card["id"]
    other = made(vision, top_k=3, beta=2, seed=18)
    assert other["id"] != card["id"]
    assert other["alpha"] != card["alpha"]


def test_a_merge_classifies(vision: Vision) -> None:
    """By cosines with the class means under the merged model, times the scale that its members learnt."""
    card = made(vision, weights=[0.5, 0.2, 0.3])
    state = vision.pool.merged(card["alpha"])
    centre = means(amt_vit.features(state, preprocessed(support())))
    several = images(5, first=500)
    rows_ND = amt_vit.features(state, preprocessed(several))
    logits = [torch.tensor([10.0 * cosine(row, one) for one in centre]) for row in rows_ND]
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(vision.classify, "emtal", urls(several))
        found = vision.classify(card["id"], urls(several))
        beside.result()
    check_probs(found["data"], logits, NAMES)
    assert found["model"] == card["id"]


def test_an_adapter_comes_and_goes(vision: Vision) -> None:
    folder = vision.folders["dora"].relative_to(vision.root)
    assert vision.server.load("late", vision.root / folder).status_code == 200
    data = vision.classify("late", urls(images(1)))["data"]
    assert data != vision.classify("vit", urls(images(1)))["data"]
    assert vision.server.unload("late").status_code == 200
    answer = vision.server.post("/v1/classify", {"model": "late", "input": urls(images(1))})
    assert answer.status_code == 404
