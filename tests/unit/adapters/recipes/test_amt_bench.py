"""What AMT's claim is measured with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.methods import lower
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.source import read
from tests.bench import amt as bench, amt_domains as domains
from tests.bench.amt_network import Network
from tests.support.bases import base_of
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import COLORS, subject_row, write_rows

TEXTS = ["Which red is number 1?", "Which gold is it?", "blue", "Who is number 2 of the browns?"]


@pytest.fixture(scope="module")
def model(base: Callable[[], Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, made = tmp_path_factory.mktemp("bases") / "tiny", base()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pool(base: Callable[[], Base], order: Callable[..., Order], data: Path, tmp_path: Path) -> Path:
    trainee, loop = begin(order("amt", steps=8, learning_rate=3e-2), base(), data)
    list(loop)
    trainee.save(tmp_path / "pool")
    return tmp_path / "pool"


@pytest.fixture
def network(model: Path, pool: Path, base: Callable[[], Base], monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr("tests.bench.amt_network.LAYERS", 2)
    monkeypatch.setattr("tests.bench.amt_network.AT_ONCE", 3)
    return Network(load_dense(model, torch.float32), base().tokenizer, pool)


@torch.no_grad()
def states(model: Any, network: Network, **given: Any) -> torch.Tensor:
    return model.model(**given).last_hidden_state[0, -1]  # type: ignore[no-any-return]


def dense(model: Path, pool: Path, alpha: tuple[float, ...] | None) -> Any:
    """The base with what the pool lowers to, merged."""
    plain = load_dense(model, torch.float32)
    if alpha is None:
        return plain
    lowered = lower(read(pool), base_of(load_dense(model, torch.float32)))
    assert lowered.gate is not None
    for path, effects in lowered.effects.items():
        pair = effects.low_rank
        assert pair is not None
        gate_R = torch.tensor(alpha)[lowered.gate.groups[path]]
        plain.get_submodule(path).weight.data += pair.b_OR @ (gate_R[:, None] * pair.a_RI)
    return plain


@pytest.mark.parametrize("alpha", [None, (0.0, 0.0, 1.0, 0.0), (0.5, 0.0, 0.0, 0.5)])
def test_features_are_those_of_the_lowered_pool_text_by_text(
    alpha: tuple[float, ...] | None, network: Network, model: Path, pool: Path
) -> None:
    below = network.below(TEXTS)
    found = network.features([below[text] for text in TEXTS], alpha)
    merged = dense(model, pool, alpha)
    rows = [states(merged, network, input_ids=torch.tensor([network.ids(text)])) for text in TEXTS]
    TOLERANCES["logits", torch.float32].assert_close(found, torch.stack(rows))


def test_an_attack_moves_each_token_by_its_strength_and_costs_the_right_class(
    network: Network, model: Path, pool: Path
) -> None:
    """The oracle perturbs one text at a time in a dense model."""
    alpha, labels_N, strength = (0.0, 1.0, 0.0, 0.0), torch.tensor([0, 1, 0, 1]), 0.3
    merged = dense(model, pool, alpha)
    means_CD = torch.stack(
        [states(merged, network, input_ids=torch.tensor([network.ids(text)])) for text in ("one", "two")]
    )
    ((found,),) = network.attacked(TEXTS, labels_N, [(alpha, means_CD)], [strength])
    embedding = merged.model.embed_tokens.weight.detach()
    step = strength * float(embedding.norm(dim=1).mean()) / embedding.shape[1] ** 0.5
    for text, label, feature in zip(TEXTS, labels_N.tolist(), found, strict=True):
        given = embedding[torch.tensor([network.ids(text)])].requires_grad_()
        clean = merged.model(inputs_embeds=given).last_hidden_state[0, -1]
        cosines = torch.cosine_similarity(clean[None], means_CD)
        (slope,) = torch.autograd.grad(-(network.scale * cosines).log_softmax(0)[label], given)
        moved = states(merged, network, inputs_embeds=given + step * slope.sign())
        TOLERANCES["logits", torch.float32].assert_close(feature, moved)
        margin = torch.cosine_similarity(moved[None], means_CD) - cosines.detach()
        assert margin[label] < margin[1 - label]


def test_noise_is_of_the_text_alone() -> None:
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening of the next day"
    words, letters = domains.without_words(text), domains.misspelt(text)
    assert 12 <= len(words.split()) < len(text.split())
    assert set(words.split()) <= set(text.split())
    changed = sum(one != other for one, other in zip(text, letters, strict=True))
    assert 2 <= changed <= 16
    assert [one.isalpha() for one in text] == [other.isalpha() for other in letters]
    assert (words, letters) == (domains.without_words(text), domains.misspelt(text))
    assert domains.without_words("one") == "one"


def test_episodes_have_as_many_classes_as_there_are() -> None:
    texts = {label: [f"{label} {number}" for number in range(12)] for label in "abc"}
    found = domains.Domain("x", texts)
    for support, queries in found.episodes(9):
        assert [len(support), len(queries)] == [15, 15]
        assert set(support).isdisjoint(queries)
        assert list(dict.fromkeys(label for _, label in support)) == list(dict.fromkeys(label for _, label in queries))
    assert list(found.episodes(2)) == list(found.episodes(9))[:2]


def test_a_domain_has_short_texts_of_labels_with_enough_of_them(data: Path) -> None:
    found = domains.domain("subjects", data, len)
    assert found.texts.keys() == {"black", "gold", "navy", "red"}, "a third of the labels"
    assert found == domains.domain("subjects", data, len)
    few = domains.domain("subjects", data, lambda text: 99 if "black is number 3" in text else 1)
    assert few.texts.keys() == {"gold", "navy", "red"}


def test_the_domains_are_measured_once_and_agree_with_a_server(
    network: Network, model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [subject_row(color, number) for color in COLORS for number in range(50)]
    write_rows(tmp_path, "qa/mmlu.test", rows)
    monkeypatch.setattr(bench, "HELD_OUT", ("subjects",))
    monkeypatch.setattr(bench, "EPISODES", 3)
    monkeypatch.setattr(bench, "ATTACKED_EPISODES", 2)
    out = tmp_path / "amt.jsonl"
    for _ in range(2):
        bench.main(["--data", str(tmp_path), "--results", str(out), "--model", str(model), "--pool", str(pool)])
    validation, line = (json.loads(line) for line in out.read_text().splitlines())
    assert (validation["label"], validation["arguments"]["noises"]) == ("subjects-dev", ["clean"])
    results = line["results"]
    assert results["served"]["largest_alpha_difference"] <= bench.PARITY
    names = {"base", "uniform", "best by score", "merged", *(f"member {number}" for number in range(4))}
    for noise in domains.NOISES:
        assert results[noise]["classifiers"].keys() == names
        assert sum(results[noise]["alpha_mean"]) == pytest.approx(1, abs=1e-5)
        assert sum(results[noise]["chosen_share"]) == pytest.approx(2)
    assert results["attacked"]["0.4"]["classifiers"].keys() == names
    assert str(tmp_path) not in out.read_text()


def test_a_server_that_says_otherwise_ends_the_measurement(network: Network, data: Path) -> None:
    class Other:
        async def classified(self, support: Any, texts: Any) -> Any:
            labels = list(dict.fromkeys(label for _, label in support))
            return [0.25] * 4, [labels[0]] * len(texts), torch.full((len(texts), len(labels)), 1 / len(labels))

    found = domains.Domain("x", domains.domain("subjects", data, lambda _: 1).texts)
    with pytest.raises(AssertionError, match="x"):
        asyncio.run(bench.agreement(network, found, Other()))  # type: ignore[arg-type]
