"""Whether a server says what PEFT computes: asked before its speed is measured. Knows nothing of speed.

A bfloat16 server may leave the float32 answer where two tokens are all but equal, so it is followed up to there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.prompts import PromptShape

TOKENS = 16
PROMPTS = 2
GAP = 0.5
"""Nats between the best token and the one that was said: serving in bfloat16 moves a log-probability by up to 0.40."""
LEAST_FOLLOWED = 4
"""Tokens of an answer on average, or the answers say too little."""


class ParityError(RuntimeError):
    """A server says something else than PEFT: its speed means nothing."""


@dataclass(frozen=True)
class Parity:
    """Over all answers.

    Attributes:
        tokens: compared, up to the first that differs.
        complete: answers without any.
        told: adapters' answers of which the base's own differs beyond the gap within what was compared.
    """

    answers: int
    tokens: int
    complete: int
    told: int


def reference(model: Path, adapters: Mapping[str, Path], base: str) -> list[dict[str, Any]]:
    """PEFT's answers of the base and of every adapter; see `reference_program`.

    Raises:
        CalledProcessError: the program failed, after it said why.
    """
    shape = PromptShape(24)
    asked = {
        "model": str(model),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "base": base,
        "prompts": [shape.build(0, f"parity/{index}") for index in range(PROMPTS)],
        "tokens": TOKENS,
        "gap": GAP,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.peers.reference_program"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check(url: str, expected: Sequence[Mapping[str, Any]], base: str) -> Parity:
    """Ask for every answer, all at once, so that the adapters meet in one batch.

    Raises:
        ParityError: an answer leaves PEFT's where no other token is near, or the answers tell nothing apart.
    """
    with ThreadPoolExecutor(len(expected)) as pool:
        said = list(pool.map(lambda one: _said(url, one), expected))
    followed = [_followed(one, tokens) for one, tokens in zip(expected, said, strict=True)]
    of_base = {tuple(one["prompt"]): one["tokens"] for one in expected if one["model"] == base}
    adapted = [(one, count) for one, count in zip(expected, followed, strict=True) if one["model"] != base]
    found = Parity(
        answers=len(expected),
        tokens=sum(followed),
        complete=sum(count == len(one["tokens"]) for one, count in zip(expected, followed, strict=True)),
        told=sum(_leaves(of_base[tuple(one["prompt"])], one, count) for one, count in adapted),
    )
    if found.tokens < LEAST_FOLLOWED * found.answers or 2 * found.told < len(adapted):
        raise ParityError(f"the answers say too little to compare: {found}")
    return found


def _said(url: str, one: Mapping[str, Any]) -> list[str]:
    body = {
        "model": one["model"],
        "prompt": one["prompt"],
        "max_tokens": len(one["tokens"]),
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "skip_special_tokens": False,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        tokens: list[str] = json.load(response)["choices"][0]["logprobs"]["tokens"]
    return tokens


def _followed(one: Mapping[str, Any], said: Sequence[str]) -> int:
    """Tokens up to the first that differs."""
    for place, (expected, instead, token) in enumerate(zip(one["tokens"], one["instead"], said, strict=True)):
        if token == expected:
            continue
        if token in instead:
            return place
        raise ParityError(
            f"{one['model']} says {token!r} at token {place}, PEFT in float32 {expected!r}; within {GAP} nats of that "
            f"is only {instead}"
        )
    return len(one["tokens"])


def _leaves(base: Sequence[str], one: Mapping[str, Any], followed: int) -> bool:
    """Whether the base's answer would not have passed for the adapter's."""
    for expected, instead, token in zip(one["tokens"][:followed], one["instead"], base, strict=False):
        if token != expected:
            return token not in instead
    return False
