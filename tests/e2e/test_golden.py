"""An adapter that does not compute what its author saw never answers a request."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from motet.server.cli import cli
from tests.e2e.process import Server, environment, eventually, free_port

NAME = "vouched"


@pytest.fixture(scope="module")
def written(tiny_adapter: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny adapter's golden.json, from its dense merge."""
    file = tmp_path_factory.mktemp("golden") / "golden.json"
    threads = torch.get_num_threads()
    arguments = ["verify", str(tiny_adapter), "--model", str(tiny_model), "--dtype", "float32"]
    arguments += ["--write-golden", str(file), "--tolerance", "0.001"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture
def vouched(tiny_adapter: Path, tiny_root: Path, written: Path, administered: Server) -> Iterator[Path]:
    """The tiny adapter beside its golden.json, below the server's root."""
    folder = shutil.copytree(tiny_adapter, tiny_root / NAME)
    shutil.copy(written, folder)
    yield folder
    shutil.rmtree(folder)
    if NAME in administered.models:
        administered.unload(NAME)


def spoil(folder: Path, prompt: int = 1, position: int = 3, by: float = -0.1) -> None:
    content = json.loads((folder / "golden.json").read_text())
    content["prompts"][prompt]["logprobs"][position - 1] += by
    (folder / "golden.json").write_text(json.dumps(content))


def test_what_verify_writes_is_checked_and_served(administered: Server, vouched: Path) -> None:
    response = administered.load(NAME, NAME)
    assert response.status_code == 200, response.text
    models = administered.models
    assert models[NAME]["adapter"]["version"] == models["tuned"]["adapter"]["version"], "no part of the content"


def test_a_deviation_refuses_while_others_are_answered(administered: Server, vouched: Path) -> None:
    spoil(vouched)
    used = administered.metrics["motet_adapter_memory_bytes"]
    with (
        administered.openai() as client,
        client.completions.create(
            model="tuned", prompt="the lazy dog", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as stream,
    ):
        next(stream)
        response = administered.load(NAME, NAME)
        assert administered.metrics["motet_running"] >= 1, "the answer was over before the refusal"
        assert sum(1 for _ in stream) == 399
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "adapter_golden_mismatch")
    for said in ("prompt 1 of golden.json, position 3", "expected is", "tolerance of 0.001"):
        assert said in error["message"]
    assert str(vouched) not in error["message"]
    assert NAME not in administered.models
    assert administered.post("/v1/completions", {"model": NAME, "prompt": "a"}).status_code == 404
    eventually(lambda: administered.metrics["motet_adapter_memory_bytes"] == used)


def test_the_other_adapters_golden_values_refuse(administered: Server, vouched: Path) -> None:
    """The disaster it is for: a folder whose weights are not the ones its author tested."""
    content = json.loads((vouched / "adapter_config.json").read_text())
    (vouched / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 9}))
    response = administered.load(NAME, NAME)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_golden_mismatch")


def test_a_start_is_refused_too(tiny_model: Path, vouched: Path) -> None:
    spoil(vouched)
    motet = str(Path(sys.executable).with_name("motet"))
    command = [motet, "serve", "--port", str(free_port()), "--model", str(tiny_model), "--dtype", "float32"]
    command += ["--adapter", f"{NAME}={vouched}", "--adapter-cache", "off"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error  prompt 1 of golden.json, position 3")
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stdout
