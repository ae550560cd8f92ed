"""A gated adapter with its gate fixed: verified, vouched for, and exported as the plain LoRA that it then is."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel

from motet.adapters.errors import AdapterError
from motet.server.cli import cli
from tests.e2e.gated import Gated, close, logprobs
from tests.e2e.process import ADMIN_KEY
from tests.support.tolerances import TOLERANCES

Motet = Callable[..., Result]
WEIGHTS = [0.1, 0.2, 0.3, 0.4]
GATE = ["--gate", "0.1,0.2,0.3,0.4"]
GATED = ["users", "tenant/pool"]
NOISE = TOLERANCES["log-probabilities", torch.float32].atol


@pytest.fixture
def motet(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Motet]:
    """The command line, as an administrator of the server; some commands take this process's threads."""
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("MOTET_URL", gated.server.url)
    monkeypatch.setenv("MOTET_MODEL", str(gated.model))
    threads = torch.get_num_threads()
    yield lambda *arguments: CliRunner().invoke(cli, [str(one) for one in arguments])
    torch.set_num_threads(threads)


def oracle(gated: Gated, name: str, weights: Sequence[float]) -> Any:
    return (gated.users if name == "users" else gated.pool).oracle(weights)


@pytest.mark.parametrize("name", GATED)
def test_served_is_the_dense_merge_of_that_gate(gated: Gated, motet: Motet, name: str) -> None:
    result = motet("verify", name, *GATE, "--json", "--tolerance", NOISE)
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["gate"] == WEIGHTS
    assert 0 < body["max_difference"]["adapter"] <= NOISE
    assert json.loads(motet("verify", "left", "--json").stdout)["gate"] is None


@pytest.mark.parametrize("name", GATED)
def test_golden_values_say_their_gate(gated: Gated, motet: Motet, name: str) -> None:
    folder = shutil.copytree(gated.folders[name], gated.folders["left"].parent / "vouched")
    file = folder / "golden.json"
    try:
        prompt = ["--prompt", "the quick brown fox jumps"]
        arguments = [folder, *GATE, *prompt, "--dtype", "float32", "--write-golden", file, "--tolerance", 0.001]
        result = motet("verify", *arguments)
        assert result.exit_code == 0, result.output
        content = json.loads(file.read_text())
        assert content["gate"] == WEIGHTS
        ids = torch.tensor([content["prompts"][0]["tokens"]])
        close(content["prompts"][0]["logprobs"], logprobs(oracle(gated, name, WEIGHTS), ids))
        response = gated.server.load("vouched", folder)
        assert response.status_code == 200, response.text
        assert gated.server.unload("vouched").status_code == 200
        for gate, said in (([0.4, 0.3, 0.2, 0.1], "position"), ([0.5, 0.5], "2 numbers"), (None, "give 4 weights")):
            changed = content | {"gate": gate} if gate else {k: v for k, v in content.items() if k != "gate"}
            file.write_text(json.dumps(changed))
            response = gated.server.load("vouched", folder)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_golden_mismatch")
            assert said in response.json()["error"]["message"]
        assert "vouched" not in gated.server.models
    finally:
        shutil.rmtree(folder)


@torch.no_grad()
@pytest.mark.parametrize("name", GATED)
def test_exported_as_the_lora_of_that_gate(gated: Gated, motet: Motet, tmp_path: Path, name: str) -> None:
    ids = torch.tensor([gated.ids("the quick brown fox jumps")])
    expected = logprobs(oracle(gated, name, WEIGHTS), ids)
    for source, out in ((name, tmp_path / "by-name"), (gated.folders[name], tmp_path / "by-folder")):
        result = motet("export", source, "--to", "peft", out, *GATE)
        assert result.exit_code == 0, result.output
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's matter
            model = PeftModel.from_pretrained(gated.dense, str(out)).eval()
        close(logprobs(model, ids).tolist(), expected)


@pytest.mark.parametrize("command", [["verify"], ["export", "--to", "peft", "OUT"]], ids=["verify", "export"])
@pytest.mark.parametrize(
    ("source", "gate", "said"),
    [
        ("users", [], "gate"),
        ("left", GATE, "has no gate"),
        ("users", ["--gate", "0.5,0.5"], "2 numbers"),
        ("tenant/pool", ["--gate", "1,1,0,0"], "su"),
        ("users", ["--gate", "0.1,x"], "list of numbers"),
        ("users", ["--gate", ""], "list of numbers"),
    ],
)
def test_what_cannot_be(
    motet: Motet, tmp_path: Path, command: list[str], source: str, gate: list[str], said: str
) -> None:
    name, *others = [str(tmp_path / "out") if part == "OUT" else part for part in command]
    result = motet(name, source, *others, *gate)
    assert result.exit_code != 0
    assert said in result.stderr + str(result.exception)
    assert result.exit_code == 2 or isinstance(result.exception, AdapterError)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_receipt_says_at_which_gate_it_measured(gated: Gated, motet: Motet) -> None:
    assert "4 factors; norms at 0.25 each" in motet("adapters", "inspect", gated.folders["users"]).stdout
    assert "norms at" not in motet("adapters", "inspect", gated.folders["left"]).stdout
    body = json.loads(motet("adapters", "inspect", gated.folders["tenant/pool"], "--json").stdout)
    assert body["gate"] == [0.25] * 4
    dense = gated.pool.oracle([0.25] * 4)
    for target, norm in body["relative_norms"].items():
        own_OI = gated.users.base.get_submodule(target).weight
        change = torch.linalg.vector_norm(dense.get_submodule(target).weight - own_OI)
        assert norm == pytest.approx(float(change / torch.linalg.vector_norm(own_OI)), rel=1e-3)
