"""A server with a base in int8 says so, and answers as over weights that torch rounded; torch alone refuses it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.e2e.process import Server, environment, free_port
from tests.support.int8 import round_linears
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES

MOTET = str(Path(sys.executable).with_name("motet"))
PROMPT = list(range(40, 80))
INT8 = ["--base-weights", "int8"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Iterator[Server]:
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB", *INT8]
    server = Server([*arguments, "--adapter", f"tuned={tiny_adapter}"], tmp_path_factory.mktemp("int8") / "log")
    try:
        yield server.wait_until_ready()
    finally:
        code = server.stop()
    assert code == 0, server.log.read_text()


@pytest.mark.parametrize("name", ["tiny", "tuned"])
@torch.inference_mode()
def test_log_probabilities_are_those_over_the_rounded_weights(
    rounded: Server, tiny_model: Path, tiny_adapter: Path, name: str
) -> None:
    model = load_dense(tiny_model, torch.float32)
    round_linears(model)
    if name == "tuned":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = PeftModel.from_pretrained(model, tiny_adapter).eval()
    ids = torch.tensor([PROMPT])
    expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    actual = torch.tensor(rounded.prompt_logprobs(name, PROMPT))
    TOLERANCES["logits", torch.float32].assert_close(actual, expected)


def test_it_is_said_and_answers_are_told_from_those_of_the_exact_base(rounded: Server, tiny_server: Server) -> None:
    exact = tiny_server.complete(model="tiny", prompt=PROMPT, max_tokens=1)["system_fingerprint"]
    assert rounded.complete(model="tiny", prompt=PROMPT, max_tokens=1)["system_fingerprint"] == f"{exact}_int8"
    assert rounded.http.get("/version").json()["weights"] == "int8"
    assert tiny_server.http.get("/version").json()["weights"] == "exact"
    assert "float32, linears in int8" in rounded.log.read_text()


@pytest.mark.parametrize("more", [["--native", "off"], ["--dtype", "float16", "--native", "off"]], ids=" ".join)
def test_torch_alone_does_not_multiply_with_it(tiny_model: Path, more: list[str]) -> None:
    command = [MOTET, "serve", "--port", str(free_port()), "--model", str(tiny_model), *INT8, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 1
    assert "--base-weights int8: only the compiled CPU backend multiplies with them" in done.stderr
    assert "Traceback" not in done.stderr
