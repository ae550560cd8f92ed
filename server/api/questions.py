"""What a decision's question is about: its options, how a prompt asks for them, and the answer in OpenAI's shape.

Must not know: adapters, how probabilities are computed.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.server.api.decision_body import ChoiceQuestion, Predicate, QuestionBody, ScoreQuestion, text_of
from motet.server.api.errors import bad_request

LETTERS = string.ascii_uppercase
"""Name the options in a prompt."""
TRUE, FALSE = ("true", "yes"), ("false", "no")
"""Labels of a head that answer a predicate, whatever their case."""


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer.

    Attributes:
        value: of the answer's JSON.
        label: as a head calls it.
    """

    value: str | bool | int
    label: str
    description: str | None = None


def options_of(question: QuestionBody, field: str) -> list[Option]:
    """Distinct, in the question's order; a predicate's are true and false.

    Raises:
        ApiError: one stands twice.
    """
    if isinstance(question, Predicate):
        return [Option(True, "true"), Option(False, "false")]
    if isinstance(question, ChoiceQuestion):
        options = [Option(one.value, _spelt(one.value), one.description) for one in question.choices]
        keys: list[Any] = [(type(option.value), option.value) for option in options]
    else:
        options = [Option(value, one.label, one.description) for value, one in enumerate(question.levels)]
        keys = [option.label for option in options]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        name = "choices" if isinstance(question, ChoiceQuestion) else "levels"
        shown = twice[1] if isinstance(twice, tuple) else twice
        raise bad_request(f"{field}.{name} has {shown!r} twice; each must be another one", f"{field}.{name}")
    return options


def asked(question: QuestionBody, options: Sequence[Option], field: str) -> str:
    """The question as a prompt asks it: a letter for each option.

    Raises:
        ApiError: there are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise bad_request(
            f"{field} has {len(options)} options; a model without a head that knows them answers at most "
            f"{len(LETTERS)}",
            field,
        )
    lines = [f"Question: {instructions}"] if (instructions := text_of(question.instructions)) else []
    for letter, option in zip(LETTERS, options, strict=False):
        shown = json.dumps(option.value) if isinstance(option.value, bool) else option.label
        lines.append(f"{letter}: {shown}" + (f" - {option.description}" if option.description else ""))
    return "\n".join([*lines, "Answer with the letter of one option only."])


def places(question: QuestionBody, options: Sequence[Option], labels: Sequence[str], field: str) -> list[int]:
    """Which label of a head is each option.

    Raises:
        ApiError: the question's options are not the head's labels.
    """
    if isinstance(question, Predicate):
        lower = [label.lower() for label in labels]
        found = [[place for place, label in enumerate(lower) if label in words] for words in (TRUE, FALSE)]
        if len(labels) == 2 and all(len(one) == 1 for one in found):
            return [one[0] for one in found]
        wanted = "a head with the labels true and false, or yes and no"
    else:
        if sorted(option.label for option in options) == sorted(labels):
            return [labels.index(option.label) for option in options]
        wanted = "exactly the labels of the model's head as options"
    raise bad_request(
        f"{field} is a {question.type} question, which needs {wanted}; this head knows "
        f"{', '.join(map(repr, labels[:8]))}{' and others' if len(labels) > 8 else ''}: ask for them, or ask a model "
        "without a head",
        field,
        "uncertainty_unsupported",
    )


def answer(
    question: QuestionBody,
    options: Sequence[Option],
    probabilities: Sequence[float],
    confidence: float,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """In OpenAI's shape.

    Args:
        probabilities: of the options; they sum to 1.
        confidence: in the likeliest option.
        more: fields of our own.
    """
    said: dict[str, Any] = {"type": question.type, "name": question.name}
    pairs = list(zip(options, probabilities, strict=True))
    if isinstance(question, Predicate):
        return {**said, "probability": probabilities[0], **more}
    if isinstance(question, ScoreQuestion):
        said["score"] = sum(place * p for place, p in enumerate(probabilities))
        each = [{"value": option.value, "label": option.label, "probability": p} for option, p in pairs]
    else:
        said["choice"] = max(pairs, key=lambda pair: pair[1])[0].value
        each = [{"value": option.value, "probability": p} for option, p in pairs]
    return {**said, "confidence": confidence, "probabilities": each, **more}


def _spelt(value: str | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)
