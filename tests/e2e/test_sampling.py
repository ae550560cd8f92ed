"""Sampling parameters, from the request's JSON to the text: what each promises, and that neighbours change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.process import Server

PROMPT = "the quick brown fox"
RANDOM: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
GREEDY: dict[str, Any] = {**RANDOM, "temperature": 0}


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def text(answer: dict[str, Any]) -> str:
    return texts(answer)[0]


def streamed(server: Server, body: dict[str, Any]) -> tuple[list[str], str]:
    """Pieces of text of a single choice, and why it ended."""
    with server.openai() as client:
        known = {key: value for key, value in body.items() if key in ("model", "prompt", "max_tokens", "temperature")}
        more = {key: value for key, value in body.items() if key not in known}
        with client.completions.create(**known, stream=True, extra_body=more) as stream:
            choices = [chunk.choices[0] for chunk in stream]
    return [choice.text for choice in choices], choices[-1].finish_reason


@pytest.fixture(scope="module")
def ascii_only(tiny_tokenizer: Any) -> dict[str, float]:
    """A bias that leaves tokens of whole, plain characters: their texts joined are the text."""
    texts = {str(id): tiny_tokenizer.decode([id]) for id in range(len(tiny_tokenizer))}
    return {id: -100 for id, text in texts.items() if not text.isascii() or text.startswith("<")}


@pytest.fixture(scope="module")
def lively(tiny_server: Server, ascii_only: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
    """A repeatable request and the tokens of its answer, the first ten of which are all different."""
    for seed in range(100):
        body = {**RANDOM, "seed": seed, "logit_bias": ascii_only}
        tokens: list[str] = tiny_server.complete(**body, logprobs=0)["choices"][0]["logprobs"]["tokens"]
        if len(set(tokens[:10])) == 10:
            return body, tokens
    raise AssertionError("no seed gives ten different tokens")


class TestSeed:
    def test_a_seed_repeats_an_answer_alone_and_among_others(self, tiny_server: Server) -> None:
        seeds = range(6)
        alone = [text(tiny_server.complete(**RANDOM, seed=seed)) for seed in seeds]
        assert len(set(alone)) == len(alone), "different seeds, different answers"

        def other(i: int) -> None:
            tiny_server.complete(**{**RANDOM, "model": ("tiny", "tuned")[i % 2], "prompt": "x" * i, "max_tokens": 40})

        with ThreadPoolExecutor(20) as pool:
            others = [pool.submit(other, i) for i in range(1, 13)]
            again = list(pool.map(lambda seed: text(tiny_server.complete(**RANDOM, seed=seed)), seeds))
            together = pool.submit(lambda: texts(tiny_server.complete(**{**RANDOM, "prompt": [PROMPT] * 3}, seed=5)))
            for one in others:
                one.result()
        assert again == alone
        assert together.result() == [alone[5]] * 3

    def test_without_a_seed_answers_differ(self, tiny_server: Server) -> None:
        assert len(set(texts(tiny_server.complete(**RANDOM, n=6)))) == 6

    def test_the_n_answers_of_a_seed_differ_and_repeat(self, tiny_server: Server) -> None:
        first = tiny_server.complete(**RANDOM, n=4, seed=11)
        assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
        assert len(set(texts(first))) == 4
        assert texts(tiny_server.complete(**RANDOM, n=4, seed=11)) == texts(first)
        assert text(tiny_server.complete(**RANDOM, seed=11)) == text(first)
        assert first["usage"]["completion_tokens"] == 4 * RANDOM["max_tokens"]

    def test_n_answers_of_several_prompts_are_ordered_by_prompt(self, tiny_server: Server) -> None:
        several = ["one", "two", "three"]
        body = {**RANDOM, "prompt": several, "n": 2, "echo": True, "seed": 1}
        answer = tiny_server.complete(**body)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert all(said.startswith(several[i // 2]) for i, said in enumerate(texts(answer)))

    def test_temperature_zero_ignores_the_seed(self, tiny_server: Server) -> None:
        assert len({text(tiny_server.complete(**GREEDY, seed=seed)) for seed in (None, 1, 2)}) == 1

    @pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-300}])
    def test_the_narrowest_choice_is_greedy(self, tiny_server: Server, narrow: dict[str, Any]) -> None:
        assert text(tiny_server.complete(**{**RANDOM, **narrow})) == text(tiny_server.complete(**GREEDY))

    def test_a_huge_top_k_keeps_all(self, tiny_server: Server) -> None:
        expected = text(tiny_server.complete(**RANDOM, seed=3))
        for top_k in (0, -1, 10**6, 10**30):
            assert text(tiny_server.complete(**RANDOM, seed=3, top_k=top_k)) == expected


class TestStop:
    STOPS: Mapping[str, Callable[[Sequence[str]], str]] = {
        "a token": lambda tokens: tokens[4],
        "split": lambda tokens: tokens[4][-1:] + tokens[5][:1],
        "long": lambda tokens: tokens[3][-1:] + "".join(tokens[4:6]) + tokens[6][:1],
    }

    @pytest.mark.parametrize("kind", STOPS)
    @pytest.mark.parametrize("included", [False, True], ids=["left out", "included"])
    def test_a_stop_string_ends_the_text(
        self, tiny_server: Server, lively: tuple[dict[str, Any], list[str]], kind: str, included: bool
    ) -> None:
        body, tokens = lively
        whole, stop = "".join(tokens), self.STOPS[kind](tokens)
        expected = whole[: whole.index(stop) + len(stop) * included]
        body = {**body, "stop": ["never there", stop], "include_stop_str_in_output": included}
        answer = tiny_server.complete(**body)
        assert (text(answer), answer["choices"][0]["finish_reason"]) == (expected, "stop")
        assert answer["usage"]["completion_tokens"] <= 7
        pieces, finish = streamed(tiny_server, body)
        assert ("".join(pieces), finish) == (expected, "stop")
        assert len(pieces) == answer["usage"]["completion_tokens"], "one chunk per token, held back or not"

    def test_what_was_held_back_comes_with_the_end(
        self, tiny_server: Server, lively: tuple[dict[str, Any], list[str]]
    ) -> None:
        body, tokens = lively
        pieces, finish = streamed(tiny_server, {**body, "max_tokens": 8, "stop": "".join(tokens[6:8]) + "\0"})
        assert ("".join(pieces), finish) == ("".join(tokens[:8]), "length")
        assert pieces[6] == "", "the seventh token may begin the stop string"

    def test_a_stop_token_is_not_shown(
        self, tiny_server: Server, lively: tuple[dict[str, Any], list[str]], tiny_tokenizer: Any
    ) -> None:
        body, tokens = lively
        [token] = [id for id in range(3, len(tiny_tokenizer)) if tiny_tokenizer.decode([id]) == tokens[5]]
        answer = tiny_server.complete(**body, stop_token_ids=[token])
        assert (text(answer), answer["choices"][0]["finish_reason"]) == ("".join(tokens[:5]), "stop")
        assert answer["usage"]["completion_tokens"] == 6

        later = tiny_server.complete(**body, stop_token_ids=[token], min_tokens=12, logprobs=0)
        assert later["usage"]["completion_tokens"] >= 12
        assert tokens[5] not in later["choices"][0]["logprobs"]["tokens"][:12]


class TestBias:
    def test_a_bias_forces_a_token(self, tiny_server: Server, tiny_tokenizer: Any) -> None:
        token = tiny_tokenizer(" dog")["input_ids"][-1]
        answer = tiny_server.complete(**RANDOM, logit_bias={str(token): 100})
        assert text(answer) == tiny_tokenizer.decode([token]) * RANDOM["max_tokens"]

    def test_a_bias_bans_a_token(self, tiny_server: Server, tiny_tokenizer: Any) -> None:
        first = tiny_server.complete(**GREEDY, logprobs=1)["choices"][0]["logprobs"]["tokens"][0]
        banned = [id for id in range(len(tiny_tokenizer)) if tiny_tokenizer.decode([id]) == first]
        answer = tiny_server.complete(**GREEDY, logit_bias={str(id): -100 for id in banned}, logprobs=1)
        reported = answer["choices"][0]["logprobs"]
        assert first not in reported["tokens"]
        assert first in reported["top_logprobs"][0], "log-probabilities are the model's own"

    def test_penalties_push_repetitions_away(self, tiny_server: Server) -> None:
        def distinct(**penalty: float) -> int:
            reported = tiny_server.complete(**{**GREEDY, "max_tokens": 60}, logprobs=0, **penalty)["choices"][0]
            return len(set(reported["logprobs"]["tokens"]))

        plain = distinct()
        assert distinct(frequency_penalty=2) > plain
        assert distinct(presence_penalty=2) > plain
        assert distinct(frequency_penalty=-2) <= plain


class TestLengths:
    def test_max_tokens(self, tiny_server: Server) -> None:
        answer = tiny_server.complete(**{**RANDOM, "max_tokens": 7})
        assert answer["usage"]["completion_tokens"] == 7
        assert answer["choices"][0]["finish_reason"] == "length"

    def test_the_default_is_sixteen_for_completions(self, tiny_server: Server) -> None:
        body = {key: value for key, value in RANDOM.items() if key != "max_tokens"}
        assert tiny_server.complete(**body)["usage"]["completion_tokens"] == 16

    def test_chat_fills_the_context(self, tiny_server: Server) -> None:
        content = "x" * 1990
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "ignore_eos": True}
        usage = tiny_server.post("/v1/chat/completions", body).json()["usage"]
        assert usage["total_tokens"] == tiny_server.models["tiny"]["max_model_len"] == 2048

    @pytest.mark.parametrize("stream", [False, True])
    def test_no_tokens_but_the_prompt(self, tiny_server: Server, stream: bool, tiny_tokenizer: Any) -> None:
        body = {**GREEDY, "max_tokens": 0, "echo": True, "logprobs": 2}
        if stream:
            assert streamed(tiny_server, body) == ([PROMPT], "length")
            return
        answer = tiny_server.complete(**body)
        tokens = tiny_tokenizer(PROMPT)["input_ids"]
        assert text(answer) == PROMPT
        assert answer["usage"]["completion_tokens"] == 0
        reported = answer["choices"][0]["logprobs"]
        assert reported["tokens"] == [tiny_tokenizer.decode([token]) for token in tokens]
        assert [
            PROMPT[offset:][: len(token)]
            for offset, token in zip(reported["text_offset"], reported["tokens"], strict=True)
        ] == reported["tokens"]
        assert reported["token_logprobs"][0] is None
        assert all(logprob < 0 for logprob in reported["token_logprobs"][1:])

    def test_echo_comes_first(self, tiny_server: Server) -> None:
        alone = text(tiny_server.complete(**GREEDY))
        assert text(tiny_server.complete(**GREEDY, echo=True)) == PROMPT + alone
        pieces, _ = streamed(tiny_server, {**GREEDY, "echo": True})
        assert "".join(pieces) == PROMPT + alone
        assert len(pieces) == GREEDY["max_tokens"]


class TestPrefixCache:
    @pytest.mark.parametrize("model", ["tiny", "tuned"])
    def test_a_second_request_finds_the_first_ones_prompt(self, tiny_server: Server, model: str) -> None:
        body = {**RANDOM, "model": model, "prompt": f"{model} is asked about this once and then again. " * 3, "seed": 4}
        first, second = tiny_server.complete(**body), tiny_server.complete(**body)
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
        length = first["usage"]["prompt_tokens"]
        assert cached == [0, (length - 1) // 16 * 16]
        assert texts(first) == texts(second)

    def test_adapters_do_not_share_what_they_computed(self, tiny_server: Server) -> None:
        body = {**GREEDY, "prompt": "a prompt that the base and the adapter both are asked for the first time"}
        answers = [tiny_server.complete(**{**body, "model": model}) for model in ("tiny", "tuned")]
        assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 0]
        assert text(answers[0]) != text(answers[1])

    def test_a_request_for_logprobs_of_the_prompt_computes_it(self, tiny_server: Server) -> None:
        body = {**GREEDY, "prompt": "log-probabilities are never taken from a cache that lacks them", "max_tokens": 1}
        tiny_server.complete(**body)
        answer = tiny_server.complete(**body, echo=True, logprobs=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert None not in answer["choices"][0]["logprobs"]["token_logprobs"][1:]
