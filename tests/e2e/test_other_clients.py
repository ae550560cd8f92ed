"""What LangChain and LiteLLM leave of an answer's uncertainty; they run in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.clients import environment
from tests.e2e.headed import Headed

PROMPT = "<user>the quick brown fox\n<assistant>"


def run(headed: Headed, client: str) -> Any:
    """The JSON that the client's program prints."""
    if (python := environment.find()) is None:
        message = "no environment of other clients: run `python -m tests.e2e.clients.environment`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    program = Path(__file__).parent / "clients" / f"{client}_program.py"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, program, headed.server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().split("\n")[-1])


def test_langchain(headed: Headed) -> None:
    """Keeps what lies in `logprobs`, streamed too, and the header; without log-probabilities nothing is left."""
    found = run(headed, "langchain")
    for logprobs in (found["whole"], found["streamed"]):
        headed.check("dense", headed.ids(PROMPT), logprobs["uncertainty"])
        assert [one["uncertainty"]["calibrated"] for one in logprobs["content"]] == [False] * 4
    assert float(found["header"]) == pytest.approx(found["whole"]["uncertainty"]["score"], abs=1e-6)
    assert "uncertainty" not in json.dumps(found["plain"])


def test_litellm(headed: Headed) -> None:
    """Keeps the choice's object as a field of the provider, or of the log-probabilities, and the header.

    Of decisions it keeps OpenAI's fields and drops ours.
    """
    found = run(headed, "litellm")
    ids = headed.ids(PROMPT)
    for provider in ("openai", "hosted_vllm"):
        said = found[provider]
        headed.check("dense", ids, said["choice"]["provider_specific_fields"]["uncertainty"])
        headed.check("dense", ids, said["with logprobs"]["logprobs"]["uncertainty"])
        headed.check("dense", ids, said["streamed"]["logprobs"]["uncertainty"])
        score = said["choice"]["provider_specific_fields"]["uncertainty"]["score"]
        assert float(said["header"]) == pytest.approx(score, abs=1e-6)
    expected = headed.expected("judge", headed.ids("the quick brown fox\n\nIt is."))
    (answer,) = found["decision"]["answers"]
    assert answer["probability"] == pytest.approx(float(expected.p_C[1]), abs=1e-5)
    assert "x_epistemic" not in answer
