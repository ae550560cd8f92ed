"""The request body of POST /v1/decisions, as OpenAI's clients write it.

Must not know: how questions are answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from motet.server.api.schemas import Body, Text

MOST_QUESTIONS = 400


class TextPart(Body):
    """One part of a message or of instructions: only text is honoured."""

    type: Literal["input_text"]
    text: Text


Content = Text | list[TextPart]


class DecisionMessage(Body):
    """One message of the input."""

    role: Literal["user", "system", "developer", "assistant"]
    content: Content
    type: Literal["message"] = "message"


class Predicate(Body):
    """How likely a statement about the input is true."""

    type: Literal["predicate"]
    instructions: Content
    name: Text | None = None


class OptionBody(Body):
    """One option of a choice; true and "true" are different ones."""

    value: StrictBool | Text
    description: Text | None = None


class ChoiceQuestion(Body):
    """Which of the options fits the input."""

    type: Literal["choice"]
    instructions: Content
    choices: list[OptionBody] = Field(min_length=2, max_length=255)
    name: Text | None = None


class LevelBody(Body):
    """One level of a scale; its place is its value."""

    label: Text
    description: Text | None = None


class ScoreQuestion(Body):
    """Where on an ordered scale the input lies."""

    type: Literal["score"]
    instructions: Content
    levels: list[LevelBody] = Field(min_length=2, max_length=255)
    name: Text | None = None


QuestionBody = Annotated[Predicate | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionBody(Body):
    """POST /v1/decisions.

    Fields that name the caller or tune a cache are accepted and have no effect on the answer.
    """

    model: str = Field(min_length=1)
    input: Text | list[DecisionMessage]
    questions: list[QuestionBody] = Field(min_length=1, max_length=MOST_QUESTIONS)
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None


def text_of(content: Content) -> str:
    """Of a message or of instructions."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
