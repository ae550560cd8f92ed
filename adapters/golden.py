"""golden.json: log-probabilities that an adapter's author vouches for, checked before the adapter is published.

Must not know: how log-probabilities are computed. The file says something about the adapter without changing it, so it
is no part of its digest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from motet.adapters.bounded import parse_object, read_file
from motet.adapters.effects import Lowered
from motet.adapters.errors import ConfigError, GateError, GoldenError, SourceNotFoundError
from motet.adapters.gates.fixed import explicit

GOLDEN_FILE = "golden.json"
MOST_BYTES = 4 << 20
MOST_PROMPTS = 64
MOST_TOKENS = 16_384
"""Of all prompts together: the check is a load's cost, beside requests that run."""
LARGEST_TOLERANCE = 10.0
"""In nats: more would tell no adapter from another."""
LARGEST_NUMBER = 1e9
"""Below it numbers are finite, and small enough to be float32."""


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """A prompt and what the trained model thinks of it.

    Attributes:
        tokens: at least two.
        logprobs: natural log-probability of token i + 1 after tokens 0 … i, in float32.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Golden:
    """The content of golden.json.

    Attributes:
        tolerance: largest |difference| in nats.
        gate: the explicit weights that a gated adapter computed with; None for one without a gate.
        vocabulary: token ids are below this, where the adapter's vocabulary is not the base's; not from the file.
    """

    tolerance: float
    prompts: tuple[GoldenPrompt, ...]
    gate: tuple[float, ...] | None = None
    vocabulary: int | None = None


def read(folder: Path, lowered: Lowered) -> Golden | None:
    """The golden log-probabilities of an adapter folder, its gate as factors; None where the folder has none.

    Raises:
        SourceError: the file leaves the folder, is too large or no JSON object.
        ConfigError: it says something else than golden.json can.
        GoldenError: its gate is none of this adapter.
    """
    try:
        if not os.path.lexists(folder / GOLDEN_FILE):
            return None
        content = read_file(folder, GOLDEN_FILE, MOST_BYTES)
    except OSError as error:
        raise SourceNotFoundError(f"{GOLDEN_FILE} cannot be read: {error.strerror}; check its permissions") from error
    golden = parse(content)
    try:
        factors = explicit(lowered.gate, golden.gate)
    except GateError as error:
        raise GoldenError(
            f"gate of {GOLDEN_FILE}: {error}; write the file anew with motet verify --write-golden"
        ) from error
    return replace(golden, gate=factors, vocabulary=lowered.vocabulary)


def parse(content: bytes) -> Golden:
    """Check every value; see `read`."""
    values = parse_object(GOLDEN_FILE, content)
    _only(values, ("tolerance", "prompts"), "", optional=("gate",))
    tolerance, prompts = values["tolerance"], values["prompts"]
    if not _is_number(tolerance) or not 0 < tolerance <= LARGEST_TOLERANCE:
        raise ConfigError(
            f"{GOLDEN_FILE}: tolerance {tolerance!r} is no number of nats above 0 and up to {LARGEST_TOLERANCE:g}"
        )
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS:
        raise ConfigError(f"{GOLDEN_FILE}: prompts is no list of 1 to {MOST_PROMPTS} prompts")
    parsed = tuple(_prompt(index, prompt) for index, prompt in enumerate(prompts))
    if (tokens := sum(len(prompt.tokens) for prompt in parsed)) > MOST_TOKENS:
        raise ConfigError(f"{GOLDEN_FILE}: its prompts have {tokens:,} tokens, at most {MOST_TOKENS:,} are checked")
    return Golden(float(tolerance), parsed, _gate(values["gate"]) if "gate" in values else None)


def dump(golden: Golden) -> str:
    """The text of a golden.json."""
    prompts = [{"tokens": list(prompt.tokens), "logprobs": list(prompt.logprobs)} for prompt in golden.prompts]
    gate = {} if golden.gate is None else {"gate": list(golden.gate)}
    return json.dumps({"tolerance": golden.tolerance, **gate, "prompts": prompts}) + "\n"


def compare(golden: Golden, served: Sequence[Sequence[float]]) -> None:
    """Require that what is served is what the author vouches for.

    Args:
        served: per prompt, the log-probabilities of its tokens from the second on.

    Raises:
        GoldenError: a value is further away than the tolerance; the message names the worst.
    """
    worst = (0.0, 0, 0)
    for index, (prompt, values) in enumerate(zip(golden.prompts, served, strict=True)):
        for position, (expected, value) in enumerate(zip(prompt.logprobs, values, strict=True), 1):
            difference = abs(value - expected)
            worst = max(worst, (math.inf if math.isnan(difference) else difference, index, position))
    difference, index, position = worst
    if difference > golden.tolerance:
        value, expected = served[index][position - 1], golden.prompts[index].logprobs[position - 1]
        raise GoldenError(
            f"prompt {index} of {GOLDEN_FILE}, position {position}: the served log-probability is {value:.4f}, "
            f"expected is {expected:.4f}, further apart than the tolerance of {golden.tolerance:g}; the adapter "
            "computes something else than its author saw: check the base model and the declarations, or write "
            f"{GOLDEN_FILE} anew with motet verify --write-golden"
        )


def _prompt(index: int, value: object) -> GoldenPrompt:
    place = f"prompt {index} of "
    if not isinstance(value, dict):
        raise ConfigError(f"{place}{GOLDEN_FILE} is a {type(value).__name__}, not an object of tokens and logprobs")
    _only(value, ("tokens", "logprobs"), place)
    tokens, logprobs = value["tokens"], value["logprobs"]
    if (
        not isinstance(tokens, list)
        or len(tokens) < 2
        or not all(type(token) is int and token >= 0 for token in tokens)
    ):
        raise ConfigError(f"{place}{GOLDEN_FILE}: tokens is no list of at least two token ids")
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens) - 1:
        raise ConfigError(
            f"{place}{GOLDEN_FILE}: logprobs is no list of {len(tokens) - 1}, one per token but the first"
        )
    if not all(_is_number(logprob) and logprob <= 0 for logprob in logprobs):
        raise ConfigError(f"{place}{GOLDEN_FILE}: logprobs holds something else than finite numbers up to 0")
    return GoldenPrompt(tuple(tokens), tuple(float(logprob) for logprob in logprobs))


def _gate(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(_is_number(weight) for weight in value):
        raise ConfigError(f"{GOLDEN_FILE}: gate is no list of finite numbers, one weight for each factor")
    return tuple(float(weight) for weight in value)


def _only(values: dict[str, Any], keys: tuple[str, ...], place: str, optional: tuple[str, ...] = ()) -> None:
    if wrong := (values.keys() - set(optional)) ^ set(keys):
        raise ConfigError(
            f"{place}{GOLDEN_FILE} has {'no' if wrong & set(keys) else 'the unknown'} key {sorted(wrong)[0]!r}; "
            f"its keys are {' and '.join((*keys, *optional))}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_NUMBER < value < LARGEST_NUMBER
