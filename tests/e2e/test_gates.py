"""Requests that give gates, items and mixtures: each answer is a dense model's, whoever else asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel

from tests.e2e.gated import Gated, close, generated, logprobs
from tests.support.tolerances import TOLERANCES

OMEGA = [0.4, 0.3, 0.2, 0.1]
HISTORIES = ([3], [1, 2, 3], [36, 0, 5, 5, 7, 8, 9, 10, 11, 12])
PARTS = [{"name": "left", "weight": 0.7}, {"name": "tenant/right", "weight": -0.4}]
HEADER = "X-Motet-Adapter"


def one_hot(place: int) -> list[float]:
    return [float(place == other) for other in range(4)]


@pytest.mark.parametrize("history", HISTORIES)
def test_a_history_chooses_the_experts(gated: Gated, history: list[int]) -> None:
    omega = gated.users.networks.weights(history).tolist()
    gated.check(gated.users.oracle(omega), model="users", gate={"history": history})


def test_a_user_embedding_does(gated: Gated) -> None:
    state = gated.users.networks.state([4, 9])[0].tolist()
    omega = gated.users.networks.weights([4, 9]).tolist()
    gated.check(gated.users.oracle(omega), model="users", gate={"user_embedding": state})


@pytest.mark.parametrize("weights", [OMEGA, one_hot(2)])
def test_weights_are_the_factors(gated: Gated, weights: list[float]) -> None:
    gated.check(gated.users.oracle(weights), model="users", gate={"weights": weights})
    gated.check(gated.pool.oracle(weights), model="tenant/pool", gate={"weights": weights})


def test_users_tell_answers_apart(gated: Gated) -> None:
    """Otherwise the comparisons above would mean little."""
    ids = torch.tensor([gated.ids("the quick brown fox")])
    one, other = (logprobs(gated.users.oracle(one_hot(place)), ids) for place in (0, 1))
    assert (one - other).abs().max() > 100 * TOLERANCES["log-probabilities", torch.float32].atol


def test_many_gates_at_once(gated: Gated) -> None:
    asks: list[tuple[Any, dict[str, Any]]] = []
    for place in range(4):
        asks.append((gated.users.oracle(one_hot(place)), {"model": "users", "gate": {"weights": one_hot(place)}}))
        asks.append((gated.pool.oracle(one_hot(place)), {"model": "tenant/pool", "gate": {"weights": one_hot(place)}}))
    with ThreadPoolExecutor(len(asks)) as threads:
        list(threads.map(lambda ask: gated.check(ask[0], **ask[1]), asks * 2))


def test_chat_streamed_and_at_once(gated: Gated) -> None:
    body: dict[str, Any] = {"model": "users", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "the fox"}], "gate": {"history": [1, 2, 3]}}
    oracle = gated.users.oracle(gated.users.networks.weights([1, 2, 3]).tolist())
    ids = gated.ids("<user>the fox\n<assistant>")
    expected = gated.tokenizer.decode(generated(oracle, torch.tensor([ids]), 6), skip_special_tokens=True)
    answer = gated.server.post("/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"]["content"] == expected, answer.text
    extra = {key: body.pop(key) for key in ("gate", "ignore_eos")}
    stream = gated.server.openai().chat.completions.create(**body, extra_body=extra, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


@pytest.mark.parametrize("through", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_items_stand_for_markers(gated: Gated, through: str, stream: bool) -> None:
    """The dense model reads the projector's rows where the markers are; log-probabilities of what it then says."""
    history, candidates = [5, 6], [7, 30, 7]
    text = "he saw [HistoryEmb], [HistoryEmb]; of [CansEmb], [CansEmb][CansEmb] the next is"
    ids, rows = with_items(gated, text if "chat" not in through else f"<user>{text}\n<assistant>", history, candidates)
    oracle = gated.users.oracle(gated.users.networks.weights(history).tolist())
    made = generated(oracle, ids, 5, rows)
    expected = logprobs(oracle, torch.cat([ids, torch.tensor([made])], 1), rows)[-5:]
    body: dict[str, Any] = {"model": "users", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    extra: dict[str, Any] = {
        "gate": {"history": history, "candidates": candidates},
        "ignore_eos": body.pop("ignore_eos"),
    }
    client = gated.server.openai()
    if "chat" in through:
        asked: dict[str, Any] = {**body, "messages": [{"role": "user", "content": text}], "logprobs": True}
        chat: Any = client.chat.completions.create(**asked, extra_body=extra, stream=stream)
        logs = [one.logprobs for chunk in (chat if stream else [chat]) for one in chunk.choices]
        found = [token.logprob for one in logs if one is not None for token in one.content]
    else:
        asked = {**body, "prompt": text, "logprobs": 0}
        plain: Any = client.completions.create(**asked, extra_body=extra, stream=stream)
        found = [log for chunk in (plain if stream else [plain]) for log in chunk.choices[0].logprobs.token_logprobs]
    close(found, expected)


def test_markers_are_echoed_as_they_were_written(gated: Gated) -> None:
    text = "he saw [HistoryEmb], then [HistoryEmb]!"
    ids, rows = with_items(gated, text, [5, 6], [])
    oracle = gated.users.oracle(gated.users.networks.weights([5, 6]).tolist())
    body = {"model": "users", "gate": {"history": [5, 6]}, "prompt": text, "echo": True, "logprobs": 1}
    choice = gated.server.complete(**body, max_tokens=1, temperature=0)["choices"][0]
    reported = choice["logprobs"]
    assert choice["text"].startswith(text)
    assert "".join(reported["tokens"][:-1]) == text
    places = [place for place, token in enumerate(reported["tokens"]) if token == "[HistoryEmb]"]
    assert places == sorted(rows)
    found = dict(enumerate(reported["token_logprobs"][:-1]))
    assert [place for place, value in found.items() if value is None] == [0, *places]
    assert [place for place, value in enumerate(reported["top_logprobs"]) if value is None] == [0, *places]
    expected = logprobs(oracle, ids, rows)
    known = [place for place in found if place not in (0, *places)]
    close([found[place] for place in known], expected[[place - 1 for place in known]])


def with_items(
    gated: Gated, text: str, history: Sequence[int], candidates: Sequence[int]
) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
    """Token ids [1, T] with zeros for markers, and what is in their places."""
    waiting = {"[HistoryEmb]": list(history), "[CansEmb]": list(candidates)}
    ids: list[int] = []
    rows: dict[int, torch.Tensor] = {}
    while text:
        at, marker = (
            min((text.find(marker), marker) for marker in waiting if marker in text)
            if "Emb]" in text
            else (len(text), "")
        )
        ids += gated.ids(text[:at])
        if marker:
            rows[len(ids)] = gated.users.networks.item_rows([waiting[marker].pop(0)])[0]
            ids.append(0)
        text = text[at + len(marker) :]
    assert not any(waiting.values())
    return torch.tensor([ids]), rows


@pytest.mark.parametrize("weights", [(0.7, -0.4), (1, 0), (8, -8)])
def test_a_linear_mixture_is_pefts_weighted_sum(gated: Gated, weights: tuple[float, float]) -> None:
    def combine(model: PeftModel) -> None:
        for adapter, weight in zip("ab", weights, strict=True):
            for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
                layer.lora_B[adapter].weight.data *= weight  # type: ignore[union-attr,operator,index]
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mixed", combination_type="cat")

    parts = [{**part, "weight": weight} for part, weight in zip(PARTS, weights, strict=True)]
    gated.check(gated.peft(combine), model="tiny", adapters=parts)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_is_pefts(gated: Gated, method: str) -> None:
    """DARE keeps everything at a density of one, so that PEFT's choice cannot differ from ours."""
    density = 0.6 if method == "ties" else 1.0

    def combine(model: PeftModel) -> None:
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "mixed", combination_type=method, density=density)

    oracle = gated.peft(combine)
    for _ in range(2):
        gated.check(oracle, model="tiny", adapters=PARTS, merge_method=method, density=density)
    gated.derived.add((method, density))


def test_the_seed_of_dare_decides(gated: Gated) -> None:
    def ask(seed: int) -> list[float]:
        gated.derived.add(("dare_ties", 0.5, seed))
        body = {"model": "tiny", "adapters": PARTS, "merge_method": "dare_ties", "density": 0.5, "merge_seed": seed}
        answer = gated.server.complete(**body, prompt="the fox", max_tokens=0, echo=True, logprobs=0)
        values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        return values

    first, again, other = ask(1), ask(1), ask(2)
    assert first == again != other


def test_all_versions_are_named(gated: Gated) -> None:
    digests = {name: card["adapter"]["version"] for name, card in gated.server.models.items() if "adapter" in card}
    short = {name: digest[:12] for name, digest in digests.items()}
    asks: list[tuple[dict[str, Any], list[str]]] = [
        ({"model": "users", "gate": {"history": [1]}}, ["users"]),
        ({"model": "tiny", "adapters": PARTS}, ["left", "tenant/right"]),
        ({"model": "tiny"}, []),
    ]
    for body, names in asks:
        answer = gated.server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **body})
        assert answer.headers.get(HEADER, "") == ", ".join(f"{name}@{digests[name]}" for name in names)
        assert answer.json()["system_fingerprint"].split("_")[2:] == [short[name] for name in names]
        assert answer.json()["model"] == body["model"]
    ties = {"model": "tiny", "adapters": PARTS, "merge_method": "ties", "density": 0.6}
    gated.derived.add(("ties", 0.6))
    answer = gated.server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **ties})
    assert answer.headers[HEADER].startswith("ties(left + tenant/right)@")


USERS, POOL = {"model": "users"}, {"model": "tenant/pool"}
MIX = {"model": "tiny", "adapters": PARTS}
ONE = PARTS[0]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (USERS, "gate"),
    (POOL, "gate"),
    ({"model": "left", "gate": {"weights": OMEGA}}, "gate"),
    ({"model": "tiny", "gate": {"weights": OMEGA}}, "gate"),
    ({**USERS, "gate": {}}, "gate.history"),
    ({**USERS, "gate": {"history": [1], "weights": OMEGA}}, "gate.weights"),
    ({**USERS, "gate": {"history": []}}, "gate.history"),
    ({**USERS, "gate": {"history": list(range(11))}}, "gate.history"),
    ({**USERS, "gate": {"history": [1, 37]}}, "gate.history"),
    ({**USERS, "gate": {"history": [38]}}, "gate.history"),
    ({**USERS, "gate": {"history": [-1]}}, "gate.history"),
    ({**USERS, "gate": {"history": [10**30]}}, "gate.history"),
    ({**USERS, "gate": {"history": ["x"]}}, "gate.history.0"),
    ({**USERS, "gate": {"user_embedding": [0.0] * 63}}, "gate.user_embedding"),
    ({**USERS, "gate": {"user_embedding": [float("nan")] * 64}}, "gate.user_embedding"),
    ({**USERS, "gate": {"user_embedding": [1e39] * 64}}, "gate.user_embedding"),
    ({**USERS, "gate": {"weights": [0.5, 0.5]}}, "gate.weights"),
    ({**USERS, "gate": {"weights": [0.5, 0.5, 0.5, 0]}}, "gate.weights"),
    ({**USERS, "gate": {"weights": [1.5, -0.5, 0, 0]}}, "gate.weights"),
    ({**USERS, "gate": {"weights": [float("nan")] * 4}}, "gate.weights"),
    ({**USERS, "gate": {"invented": 1}}, "gate.invented"),
    ({**USERS, "gate": {"history": [1]}, "text": "[HistoryEmb] [HistoryEmb]"}, "gate.history"),
    ({**USERS, "gate": {"weights": OMEGA}, "text": "[HistoryEmb]"}, "gate.history"),
    ({**USERS, "gate": {"history": [1]}, "text": "[CansEmb]"}, "gate.candidates"),
    ({**USERS, "gate": {"history": [1], "candidates": [2]}}, "gate.candidates"),
    ({**USERS, "gate": {"history": [1], "candidates": [37]}, "text": "[CansEmb]"}, "gate.candidates"),
    ({**POOL, "gate": {"history": [1]}}, "gate.history"),
    ({**POOL, "gate": {"weights": OMEGA, "candidates": []}}, "gate.candidates"),
    ({**POOL, "gate": {}}, "gate"),
    ({**POOL, "gate": {"weights": [0.5, 0.5]}}, "gate.weights"),
    ({**POOL, "gate": {"weights": [0.5, 0.5, 0.5, 0]}}, "gate.weights"),
    ({**POOL, "gate": {"weights": [float("inf")] * 4}}, "gate.weights"),
    ({**MIX, "adapters": []}, "adapters"),
    ({**MIX, "adapters": [ONE] * 17}, "adapters"),
    ({**MIX, "adapters": [ONE, {"name": "left", "weight": 8.1}]}, "adapters.1.weight"),
    ({**MIX, "adapters": [{"name": "left", "weight": float("nan")}]}, "adapters.0.weight"),
    ({**MIX, "adapters": [{"name": "left"}]}, "adapters.0.weight"),
    ({**MIX, "adapters": [ONE, {"name": "users", "weight": 1}]}, "adapters.1.name"),
    ({**MIX, "adapters": [ONE, {"name": "tenant/pool", "weight": 1}]}, "adapters.1.name"),
    ({**MIX, "adapters": [ONE, {"name": "dora", "weight": 1}]}, "adapters.1.name"),
    ({**MIX, "adapters": [{"name": "tiny", "weight": 1}]}, "adapters.0.name"),
    ({**MIX, "adapters": [ONE, {"name": "nobody", "weight": 1}]}, "adapters.1.name"),
    ({**MIX, "model": "left"}, "adapters"),
    ({**MIX, "gate": {"weights": OMEGA}}, "gate"),
    ({**MIX, "density": 0.5}, "density"),
    ({**MIX, "merge_seed": 1}, "merge_seed"),
    ({**MIX, "merge_method": "invented"}, "merge_method"),
    ({**MIX, "merge_method": "ties", "density": 0}, "density"),
    ({**MIX, "merge_method": "dare_ties", "density": 1.1}, "density"),
    ({**MIX, "merge_method": "ties", "density": float("nan")}, "density"),
    ({**MIX, "merge_method": "ties", "merge_seed": 3}, "merge_seed"),
    ({**MIX, "merge_method": "dare_ties", "merge_seed": 2**64}, "merge_seed"),
    ({**MIX, "merge_method": "ties", "adapters": [ONE, {"name": "wide", "weight": 1}]}, "adapters"),
    ({"model": "left", "merge_method": "ties"}, "merge_method"),
    ({"model": "left", "density": 0.5}, "density"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(gated: Gated, body: dict[str, Any], field: str, stream: bool) -> None:
    asked = {**body, "max_tokens": 1, "stream": stream}
    text = asked.pop("text", "a")
    answers = {
        "prompt": post(gated, "/v1/completions", {**asked, "prompt": text}),
        "messages": post(gated, "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": text}]}),
    }
    for answer in answers.values():
        assert answer.status_code in (400, 404), answer.text
        error = answer.json()["error"]
        assert error["param"] == field, answer.text
        assert str(gated.model.parent.parent) not in answer.text


def post(gated: Gated, path: str, body: dict[str, Any]) -> httpx.Response:
    """With NaN as Python's json writes it, which httpx refuses to."""
    return gated.server.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
