"""`motet verify` finds that what is served is what a dense merge computes, and finds when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from motet.adapters.effects import LowRank, TargetEffects
from motet.server.cli import cli
from motet.server.commands import reference
from tests.e2e.conftest import examples
from tests.e2e.process import ADMIN_KEY, Server
from tests.support.layout import Layout
from tests.support.tolerances import TOLERANCES

Verify = Callable[..., Result]
NOISE = TOLERANCES["log-probabilities", torch.float32].atol
DEFAULT_PROMPTS = 6


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Iterator[Verify]:
    """`motet verify` as an administrator; a folder is served in this process, whose threads it takes."""
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    threads = torch.get_num_threads()

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["verify", *arguments], catch_exceptions=False)

    yield call
    torch.set_num_threads(threads)


def largest(result: Result) -> tuple[float, float]:
    body = json.loads(result.stdout)
    assert body["max_difference"] == {
        who: max(prompt[who] for prompt in body["prompts"]) for who in ("adapter", "base")
    }
    return body["max_difference"]["adapter"], body["max_difference"]["base"]


def test_an_example_adapter_on_a_running_server(verify: Verify, server: Server) -> None:
    name = next(iter(examples()))
    result = verify(name, "--url", server.url, "--json", "--tolerance", str(NOISE))
    assert result.exit_code == 0, result.output
    adapter, base = largest(result)
    assert 0 < adapter <= NOISE
    assert 0 < base <= NOISE
    body = json.loads(result.stdout)
    assert body["adapter"] == f"{name}@{server.models[name]['adapter']['version']}"
    assert (body["base"], body["dtype"], len(body["prompts"])) == (server.base, "float32", DEFAULT_PROMPTS)
    assert body["prompts"][0]["tokens"] < 10 < 100 < body["prompts"][-1]["tokens"]


def test_another_base_than_the_servers(verify: Verify, server: Server, tiny_model: Path) -> None:
    result = verify("tenant/a", "--url", server.url, "--model", str(tiny_model))
    assert result.exit_code == 1
    assert "name the server's with --model" in result.stderr


def test_a_name_that_was_declared(verify: Verify, administered: Server, tiny_model: Path) -> None:
    result = verify("on-residual", "--url", administered.url, "--model", str(tiny_model), "--json")
    assert result.exit_code == 0, result.output
    assert max(largest(result)) <= NOISE


class TestFolder:
    def test_prompts_of_every_kind(self, verify: Verify, tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text('"the lazy dog"\n{"prompt": "one two three"}\n\n{"tokens": [70, 71, 72, 73]}\n')
        arguments = [str(tiny_adapter), "--model", str(tiny_model), "--dtype", "float32"]
        result = verify(*arguments, "--prompt", "the quick brown fox", "--prompts", str(file), "--json")
        assert result.exit_code == 0, result.output
        assert max(largest(result)) <= NOISE
        assert len(json.loads(result.stdout)["prompts"]) == 4
        assert json.loads(result.stdout)["prompts"][-1]["tokens"] == 4
        table = verify(*arguments, "--prompt", "the quick brown fox").stdout
        assert [line.split()[0] for line in table.splitlines()[-2:]] == ["0", "all"]

    def test_declarations(self, verify: Verify, tiny_model: Path, residual_layout: Layout) -> None:
        declared = ["--residual", str(residual_layout.declared.residual), "--model", str(tiny_model)]
        result = verify(str(residual_layout.folder), *declared, "--dtype", "float32", "--json")
        assert result.exit_code == 0, result.output
        assert max(largest(result)) <= NOISE

    def test_a_wrong_adapter_is_found(
        self, verify: Verify, tiny_model: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if the server forgot that alpha is twice the rank."""
        merge = reference.merge

        def wrong(effects: TargetEffects, *weights: torch.Tensor) -> object:
            assert effects.low_rank is not None
            return merge(TargetEffects(LowRank(effects.low_rank.a_RI, 2 * effects.low_rank.b_OR)), *weights)

        monkeypatch.setattr(reference, "merge", wrong)
        arguments = [str(tiny_adapter), "--model", str(tiny_model), "--dtype", "float32", "--json"]
        result = verify(*arguments, "--tolerance", "0.05")
        adapter, base = largest(result)
        assert adapter > 0.1
        assert base <= NOISE, "the base tells that it is no rounding"
        assert result.exit_code == 1
        assert "--tolerance 0.05" in result.stderr
        assert verify(*arguments).exit_code == 0, "without a tolerance it only reports"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--prompt", "t"], "has 1 tokens"),
            (["--prompts", "FILE"], "neither a string, nor an object"),
            (["--write-golden", "/nowhere/golden.json", "--prompt", "the fox"], "cannot be written"),
        ],
    )
    def test_what_cannot_be(
        self, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, arguments: list[str], said: str
    ) -> None:
        (tmp_path / "FILE").write_text('{"text": "a"}')
        arguments = [str(tmp_path / "FILE") if argument == "FILE" else argument for argument in arguments]
        threads = torch.get_num_threads()
        result = CliRunner().invoke(cli, ["verify", str(tiny_adapter), "--model", str(tiny_model), *arguments])
        torch.set_num_threads(threads)
        assert result.exit_code != 0
        assert said in " ".join((result.stderr + str(result.exception)).split())


def test_golden_values_need_the_folder(verify: Verify, tmp_path: Path) -> None:
    result = verify("tuned", "--write-golden", str(tmp_path / "golden.json"))
    assert result.exit_code == 2
    assert "needs the adapter's folder" in result.stderr
