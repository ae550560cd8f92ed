"""Decisions through the openai client: by heads as vbll has them, by letters as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch

from tests.e2e.headed import HEADS, PLAIN, Headed, close
from tests.support.models import load_dense

INPUT = "the quick brown fox jumps over the lazy dog"
HEAD_QUESTIONS: Any = {
    "dense": {"type": "choice", "choices": [{"value": value} for value in ("blue", "red", "green")]},
    "tenant/diagonal": {"type": "score", "levels": [{"label": label} for label in "badce"]},
    "judge": {"type": "predicate"},
    "softmax": {"type": "score", "levels": [{"label": label} for label in ("low", "middle", "high")]},
}
LETTER_QUESTIONS: Any = [
    {"type": "predicate", "instructions": "The fox is quick.", "name": "quick"},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "Which "}, {"type": "input_text", "text": "colour?"}],
        "choices": [{"value": "red", "description": "like fire"}, {"value": True}, {"value": "true"}],
    },
    {"type": "score", "instructions": "", "levels": [{"label": label} for label in ("low", "middle", "high", "top")]},
]
ASKED = (
    "Question: The fox is quick.\nA: true\nB: false",
    "Question: Which colour?\nA: red - like fire\nB: true\nC: true",
    "A: low\nB: middle\nC: high\nD: top",
)
ENDING = "\nAnswer with the letter of one option only."


def decide(headed: Headed, model: str, questions: Sequence[Any], given: Any = INPUT) -> Any:
    return headed.server.openai().decisions.create(model=model, input=given, questions=questions)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("instructions", ["", "What is it?"])
def test_a_head_answers(headed: Headed, name: str, instructions: str) -> None:
    """In the question's own order of options."""
    head, question = HEADS[name], {**HEAD_QUESTIONS[name], "instructions": instructions, "name": "mine"}
    decision = decide(headed, name, [question])
    text = f"{INPUT}\n\n{instructions}" if instructions else INPUT
    expected = headed.expected(name, headed.ids(text))
    p_of = dict(zip(head.labels, expected.p_C.tolist(), strict=True))
    (answer,) = decision.answers
    assert (answer.type, answer.name, decision.model) == (question["type"], "mine", name)
    assert (answer.x_method, answer.x_calibrated) == ("softmax" if name == "softmax" else "vbll", name == "judge")
    close([answer.x_epistemic, answer.x_aleatoric], [expected.total - expected.aleatoric, expected.aleatoric])
    if question["type"] == "predicate":
        close([answer.probability], [p_of["Yes"]])
        assert answer.x_threshold == head.threshold
        assert answer.x_abstain == (1 - max(p_of.values()) > head.threshold)
        return
    close([answer.confidence], [max(p_of.values())])
    if question["type"] == "choice":
        labels = [choice["value"] for choice in question["choices"]]
        assert [one.value for one in answer.probabilities] == labels
        assert answer.choice == max(p_of, key=p_of.__getitem__)
    else:
        labels = [level["label"] for level in question["levels"]]
        assert [(one.value, one.label) for one in answer.probabilities] == list(enumerate(labels))
        close([answer.score], [sum(value * p_of[label] for value, label in enumerate(labels))])
    close([one.probability for one in answer.probabilities], [p_of[label] for label in labels])
    assert decision.usage.input_tokens == decision.usage.total_tokens == len(headed.ids(text))
    assert decision.usage.output_tokens == 0


@torch.no_grad()
def by_letters(headed: Headed, asked: str, count: int) -> tuple[list[float], float]:
    """Of the letters among each other, and their share of the whole vocabulary, by the base in transformers."""
    prompt = headed.ids(f"<user>{INPUT}\n\n{asked}{ENDING}\n<assistant>")
    p_V = load_dense(headed.model, torch.float32)(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    p_L = p_V[[headed.ids(letter)[0] for letter in "ABCDEFGH"[:count]]]
    return (p_L / p_L.sum()).tolist(), float(p_L.sum())


def test_letters_answer_where_there_is_no_head(headed: Headed) -> None:
    decision = decide(headed, "tiny", LETTER_QUESTIONS)
    (quick, colour, level), counts = decision.answers, (2, 3, 4)
    found = [by_letters(headed, asked, count) for asked, count in zip(ASKED, counts, strict=True)]
    for answer, (_, mass) in zip(decision.answers, found, strict=True):
        assert (answer.x_method, answer.x_calibrated) == ("logprob", False)
        assert not hasattr(answer, "x_epistemic")
        close([answer.x_label_mass], [mass])
    assert (quick.name, colour.name) == ("quick", None)
    close([quick.probability], [found[0][0][0]])
    for answer, (p_L, mass) in zip((colour, level), found[1:], strict=True):
        close([one.probability for one in answer.probabilities], p_L)
        close([answer.confidence], [max(p_L) * mass])
    values: list[Any] = ["red", True, "true"]
    assert [one.value for one in colour.probabilities] == values
    assert colour.choice == values[max(range(3), key=found[1][0].__getitem__)]
    assert [(one.value, one.label) for one in level.probabilities] == list(enumerate(("low", "middle", "high", "top")))
    close([level.score], [sum(value * p for value, p in enumerate(found[2][0]))])


def test_the_input_is_computed_once(headed: Headed) -> None:
    """What the questions share is found in the prefix cache, and said in the usage."""
    given = f"{INPUT} {'and then the other fox, too. ' * 12}"
    decide(headed, PLAIN, LETTER_QUESTIONS[:1], given)
    usage = decide(headed, PLAIN, LETTER_QUESTIONS[1:], given).usage
    assert usage.input_tokens > usage.input_tokens_details.cached_tokens > len(headed.ids(given))


def test_messages_are_a_conversation(headed: Headed) -> None:
    messages = [
        {"role": "developer", "content": "be exact"},
        {"role": "user", "content": [{"type": "input_text", "text": INPUT}], "type": "message"},
    ]
    decision = decide(headed, "dense", [{**HEAD_QUESTIONS["dense"], "instructions": "What is it?"}], messages)
    prompt = headed.ids(f"<system>be exact\n<user>{INPUT}\n\nWhat is it?\n<assistant>")
    expected = headed.expected("dense", prompt).p_C[[2, 0, 1]].tolist()
    close([one.probability for one in decision.answers[0].probabilities], expected)
    assert decision.usage.input_tokens == len(prompt)
    after = [*messages, {"role": "assistant", "content": "yes"}]
    decision = decide(headed, "dense", [{**HEAD_QUESTIONS["dense"], "instructions": "What?"}], after)
    prompt = headed.ids(f"<system>be exact\n<user>{INPUT}\n<assistant>yes\n<user>What?\n<assistant>")
    assert decision.usage.input_tokens == len(prompt)


def choice(*values: Any) -> dict[str, Any]:
    return {"type": "choice", "instructions": "", "choices": [{"value": value} for value in values]}


def score(*labels: str) -> dict[str, Any]:
    return {"type": "score", "instructions": "", "levels": [{"label": label} for label in labels]}


PREDICATE = {"type": "predicate", "instructions": "It is."}
IMPOSSIBLE: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "model"),
    ({"questions": []}, 400, "questions"),
    ({"questions": [PREDICATE] * 401}, 400, "questions"),
    ({"questions": [PREDICATE, {"type": "noul", "instructions": ""}]}, 400, "questions.1"),
    ({"questions": [{"type": "predicate"}]}, 400, "questions.0.instructions"),
    ({"questions": [choice("a")]}, 400, "questions.0.choices"),
    ({"questions": [PREDICATE, choice("a", "b", "a")]}, 400, "questions.1.choices"),
    ({"questions": [choice(True, True)]}, 400, "questions.0.choices"),
    ({"questions": [choice(*map(str, range(27)))]}, 400, "questions.0"),
    ({"questions": [score("a", "a")]}, 400, "questions.0.levels"),
    ({"model": "dense"}, 400, "questions.0"),
    ({"model": "dense", "questions": [choice("red", "green")]}, 400, "questions.0"),
    ({"model": "dense", "questions": [score("red", "green", "blue", "grey")]}, 400, "questions.0"),
    ({"model": "softmax", "questions": [score("low", "middle", "top")]}, 400, "questions.0"),
    ({"input": "z" * 5000}, 400, "input"),
    ({"input": [{"role": "assistant", "content": "a chat begins with the user"}]}, 400, "input"),
    ({"input": [{"role": "tool", "content": ""}]}, 400, "input.0.role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, None),
    ({"invented": 1}, 400, "invented"),
]


@pytest.mark.parametrize(("change", "status", "field"), IMPOSSIBLE)
def test_what_is_refused(headed: Headed, change: dict[str, Any], status: int, field: str | None) -> None:
    body = {"model": "tiny", "input": "a", "questions": [PREDICATE], **change}
    refused = headed.server.post("/v1/decisions", body)
    assert refused.status_code == status, refused.text
    if field is not None:
        assert refused.json()["error"]["param"] == field, refused.text


def test_bookkeeping_is_accepted(headed: Headed) -> None:
    client: openai.OpenAI = headed.server.openai()
    found = client.decisions.create(
        model="judge",
        input=INPUT,
        questions=[{"type": "predicate", "instructions": ""}],
        prompt_cache_key="k",
        prompt_cache_options={"mode": "implicit"},
        safety_identifier="s",
    )
    assert len(found.answers) == 1
