"""What the server says is what transformers computes: greedy tokens, log-probabilities, penalties."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.e2e.process import Server
from tests.support.models import load_dense

TOKENS = 24
ATOL = 1e-4
"""Of log-probabilities: float32 sums in another order, over three layers; they are of order 10."""
END = 2


@pytest.fixture(scope="module", params=["tiny", "tuned"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tiny_adapter: Path) -> Iterator[tuple[str, Any]]:
    """A name that the server knows and the same model in transformers or PEFT."""
    dense = load_dense(tiny_model, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's matter
        yield request.param, dense if request.param == "tiny" else PeftModel.from_pretrained(dense, tiny_adapter).eval()


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=random).tolist()
    return [torch.randint(3, 300, (length,), generator=random).tolist() for length in lengths]


def generated(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": TOKENS, **options}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


@torch.inference_mode()
def forward_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """[positions, vocabulary]; row p is about the token at p + 1."""
    logprobs: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs


def assert_generated(
    answer: dict[str, Any], model: Any, prompt: list[int], expected: list[int], tokenizer: Any
) -> None:
    """The answer's tokens are the expected ones, by text and by log-probability.

    A token within a character has no text of its own; its log-probability tells it from the others.
    """
    choice = answer["choices"][0]
    reported = choice["logprobs"]
    assert reported["tokens"] == [tokenizer.decode([token]) for token in expected]
    rows = forward_logprobs(model, prompt + expected)[len(prompt) - 1 : -1]
    torch.testing.assert_close(
        torch.tensor(reported["token_logprobs"]),
        rows.gather(1, torch.tensor(expected)[:, None])[:, 0],
        rtol=0,
        atol=ATOL,
    )
    assert answer["usage"]["completion_tokens"] == len(expected)
    assert choice["finish_reason"] == ("stop" if expected[-1] == END else "length")


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_tokens": 8}, {"min_new_tokens": 8}),
        ({"logit_bias": {"7": 5, "100": -5}}, {"sequence_bias": {(7,): 5.0, (100,): -5.0}}),
    ],
    ids=["greedy", "repetition_penalty", "min_tokens", "logit_bias"],
)
def test_greedy_tokens_are_those_of_generate(
    tiny_server: Server, model: tuple[str, Any], tiny_tokenizer: Any, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    name, reference = model
    many = prompts(12)
    body = {"model": name, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, **asked}
    with ThreadPoolExecutor(len(many)) as pool:
        answers = list(pool.map(lambda prompt: tiny_server.complete(prompt=prompt, **body), many))
    for prompt, answer in zip(many, answers, strict=True):
        assert_generated(answer, reference, prompt, generated(reference, prompt, **options), tiny_tokenizer)


def test_an_end_token_ends_an_answer_where_generate_ends(
    tiny_server: Server, model: tuple[str, Any], tiny_tokenizer: Any
) -> None:
    name, reference = model
    bias = {"logit_bias": {str(END): 12}}
    ended = 0
    for prompt in prompts(8):
        expected = generated(reference, prompt, sequence_bias={(END,): 12.0})
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, **bias}
        answer = tiny_server.complete(**body)
        assert_generated(answer, reference, prompt, expected, tiny_tokenizer)
        if expected[-1] == END and len(expected) < TOKENS:
            ended += 1
            assert "</s>" not in answer["choices"][0]["text"]
            longer = tiny_server.complete(**body, ignore_eos=True)
            assert longer["usage"]["completion_tokens"] == TOKENS
            assert longer["choices"][0]["finish_reason"] == "length"
            assert longer["choices"][0]["logprobs"]["tokens"][: len(expected)] == [
                tiny_tokenizer.decode([token]) for token in expected
            ]
    assert ended, "no prompt leads to the end token: the test says nothing"


def test_chat_is_the_rendered_template(tiny_server: Server, model: tuple[str, Any], tiny_tokenizer: Any) -> None:
    name, reference = model
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the lazy dog"}]
    rendered = "<system>be brief\n<user>the lazy dog\n<assistant>"
    prompt = tiny_tokenizer(rendered)["input_ids"]
    response = tiny_server.post(
        "/v1/chat/completions",
        {
            "model": name,
            "messages": messages,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
        },
    )
    answer = response.json()
    content = answer["choices"][0]["logprobs"]["content"]
    expected = generated(reference, prompt)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert [entry["token"] for entry in content] == [tiny_tokenizer.decode([token]) for token in expected]
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    for entry, token in zip(content, expected, strict=True):
        if token != END:
            assert entry["bytes"] == [alphabet[c] for c in tiny_tokenizer.convert_ids_to_tokens(token)]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "greedy tokens are the most likely ones"
        assert len(entry["top_logprobs"]) == 2


class TestEvaluation:
    """The request of lm-eval's local-completions: batched token ids, echo, one token, logprobs."""

    asked = prompts(9, longest=90)

    @pytest.fixture
    def answer(self, tiny_server: Server, model: tuple[str, Any]) -> dict[str, Any]:
        return tiny_server.complete(
            model=model[0], prompt=self.asked, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        )

    def test_indices_order_the_prompts(self, answer: dict[str, Any], tiny_tokenizer: Any) -> None:
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(self.asked)))
        for choice, prompt in zip(answer["choices"], self.asked, strict=True):
            assert choice["logprobs"]["tokens"][:-1] == [tiny_tokenizer.decode([token]) for token in prompt]
            assert choice["text"].startswith(tiny_tokenizer.decode(prompt).rstrip("\ufffd"))

    def test_lengths(self, answer: dict[str, Any]) -> None:
        for choice, prompt in zip(answer["choices"], self.asked, strict=True):
            reported = choice["logprobs"]
            assert {key: len(values) for key, values in reported.items()} == dict.fromkeys(
                ("tokens", "token_logprobs", "top_logprobs", "text_offset"), len(prompt) + 1
            )
            assert reported["token_logprobs"][0] is reported["top_logprobs"][0] is None
            assert reported["text_offset"] == sorted(reported["text_offset"])

    def test_logprobs_are_those_of_a_forward(self, answer: dict[str, Any], model: tuple[str, Any]) -> None:
        for choice, prompt in zip(answer["choices"], self.asked, strict=True):
            rows = forward_logprobs(model[1], prompt)
            reported = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
            expected = [float(rows[at, token]) for at, token in enumerate(prompt[1:])] + [float(rows[-1].max())]
            torch.testing.assert_close(reported, torch.tensor(expected), rtol=0, atol=ATOL)

    def test_the_largest_logprob_tells_greedy_tokens(
        self, answer: dict[str, Any], model: tuple[str, Any], tiny_tokenizer: Any
    ) -> None:
        greedy = 0
        for choice, prompt in zip(answer["choices"], self.asked, strict=True):
            rows, reported = forward_logprobs(model[1], prompt), choice["logprobs"]
            for at, (token, row) in enumerate(zip(prompt[1:], rows, strict=False), 1):
                top, logprob = reported["top_logprobs"][at], reported["token_logprobs"][at]
                is_greedy = int(row.argmax()) == token
                greedy += is_greedy
                assert (logprob == max(top.values())) == is_greedy
                assert tiny_tokenizer.decode([int(row.argmax())]) in top
                assert tiny_tokenizer.decode([token]) in top
            assert reported["token_logprobs"][-1] == max(reported["top_logprobs"][-1].values())

    def test_a_greedy_continuation_is_recognised(self, tiny_server: Server, model: tuple[str, Any]) -> None:
        """What lm-eval asks of a multiple-choice task: is every token of the continuation the most likely one?"""
        name, reference = model
        for prompt in prompts(4):
            expected = generated(reference, prompt, max_new_tokens=6)
            for continuation, is_greedy in ((expected, True), ([(expected[0] + 1) % 300, *expected[1:]], False)):
                answer = tiny_server.complete(
                    model=name, prompt=[prompt + continuation], temperature=0, max_tokens=1, logprobs=1, echo=True
                )
                reported = answer["choices"][0]["logprobs"]
                places = range(len(prompt), len(prompt) + len(continuation))
                found = [reported["token_logprobs"][i] == max(reported["top_logprobs"][i].values()) for i in places]
                assert all(found) is is_greedy
                assert found[0] is is_greedy
