"""A lossy form asked for over HTTP, at the start and on the command line; its receipt is what an oracle measures."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from motet.adapters.errors import ConfigError
from motet.server.api.measuring import TEXTS
from motet.server.cli import cli
from tests.e2e.process import ADMIN_KEY, Server, eventually
from tests.support.layout import Layout
from tests.support.layouts_full import fine_tuned
from tests.support.lossy import dense
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES

NAME, FORMS = "lossy", ["svd-3", "1bit"]
PROMPT = list(range(40, 80))
Oracles = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_root: Path) -> Layout:
    """Two layers, the last norm and the tied embedding were trained."""
    write = fine_tuned("layers.0.", "layers.2.", "model.norm", "embed_tokens")
    return write(load_dense(tiny_model, torch.float32), tiny_root / "full", 5)


@pytest.fixture(scope="module")
def oracles(tiny_model: Path, trained: Layout) -> Oracles:
    """Form → a dense model."""
    base = load_dense(tiny_model, torch.float32)
    return {"exact": trained.oracle} | {form: dense(base, copy.deepcopy(trained.oracle), form) for form in FORMS}


@pytest.fixture(autouse=True)
def leaves_nothing_behind(administered: Server) -> Iterator[None]:
    models, used = set(administered.models), administered.metrics["motet_adapter_memory_bytes"]
    yield
    if NAME in administered.models:
        administered.unload(NAME)
    assert set(administered.models) == models
    eventually(lambda: administered.metrics["motet_adapter_memory_bytes"] == used)


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of the tokens from the second on."""
    ids = torch.tensor([tokens])
    found: torch.Tensor = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_receipt_is_what_a_pair_of_oracles_measures(
    administered: Server, trained: Layout, oracles: Oracles, tiny_tokenizer: Any, form: str
) -> None:
    response = administered.load(NAME, trained.folder, approximate=form)
    assert response.status_code == 200, response.text
    adapter = administered.models[NAME]["adapter"]
    assert (adapter["exact"], adapter["method"]) == (False, "full-model")
    prompts = [tiny_tokenizer(text)["input_ids"] for text in TEXTS]
    differences = torch.cat([(logprobs(oracles["exact"], p) - logprobs(oracles[form], p)).abs() for p in prompts])
    error, tolerance = adapter["error"], TOLERANCES["log-probabilities", torch.float32]
    assert error["logprobs"]["tokens"] == len(differences) == sum(len(p) - 1 for p in prompts)
    for found, expected in (("largest", differences.max()), ("mean", differences.mean())):
        tolerance.assert_close(torch.tensor(error["logprobs"][found]), expected)
    assert error["logprobs"]["mean"] > 50 * tolerance.atol, "the form misses nothing: the test says nothing"
    assert error["form"] == form
    assert 0.3 < error["change"]["relative"] < 1
    assert len(error["change"]["targets"]) == 14
    assert error["summary"] in response.text
    assert administered.http.get(f"/v1/models/{NAME}").json()["adapter"] == adapter


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_the_dense_lossy_model(
    administered: Server, trained: Layout, oracles: Oracles, form: str
) -> None:
    assert administered.load(NAME, trained.folder, approximate=form).status_code == 200
    served = torch.tensor(administered.prompt_logprobs(NAME, PROMPT))
    TOLERANCES["log-probabilities", torch.float32].assert_close(served, logprobs(oracles[form], PROMPT))


def test_the_form_is_part_of_the_version(administered: Server, trained: Layout) -> None:
    versions = set()
    for approximate in (None, *FORMS):
        response = administered.load(NAME, trained.folder, approximate=approximate, load_inplace=True)
        assert response.status_code == 200, response.text
        versions.add(administered.models[NAME]["adapter"]["version"])
    assert len(versions) == 3
    assert administered.load(NAME, trained.folder, load_inplace=True).text.endswith("added successfully.")
    assert administered.models[NAME]["adapter"]["error"] is None


@pytest.mark.parametrize(
    ("form", "said"),
    [("svd-0", "approximate 'svd-0' is no form that is served"), ("svd-40", "ask for svd-28 or less")],
)
def test_refusals(administered: Server, trained: Layout, tiny_root: Path, form: str, said: str) -> None:
    response = administered.load(NAME, trained.folder, approximate=form)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_refused")
    assert said in response.json()["error"]["message"]
    assert str(tiny_root) not in response.text


def test_a_plain_adapter_has_nothing_to_approximate(
    administered: Server, residual_layout: Layout, tiny_root: Path
) -> None:
    residual = residual_layout.declared.residual
    assert residual is not None
    response = administered.load(NAME, residual_layout.folder, residual_path=str(residual), approximate="1bit")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_refused")
    assert "approximate=1bit would change nothing" in response.json()["error"]["message"]


def motet(*arguments: str) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(cli, list(arguments))
    finally:
        torch.set_num_threads(threads)


def test_command_line(administered: Server, trained: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("MOTET_URL", administered.url)
    result = motet("adapters", "load", NAME, str(trained.folder), "--approximate", "svd-3")
    assert result.exit_code == 0, result.output
    assert "svd-3: misses" in result.stdout
    assert "moves log-probabilities by" in result.stdout
    table = " ".join(motet("adapters", "list").stdout.split())
    assert "svd-3: misses" in table
    assert "exact" in table
    (row,) = [row for row in json.loads(motet("adapters", "list", "--json").stdout) if row["id"] == NAME]
    assert row["adapter"]["error"]["logprobs"]["mean"] > 0
    unknown = motet("adapters", "load", NAME, str(trained.folder), "--approximate", "svd")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "write svd-R" in unknown.stderr


def test_inspect_shows_what_the_form_misses_of_the_change(
    administered: Server, trained: Layout, tiny_model: Path, tiny_adapter: Path
) -> None:
    assert administered.load(NAME, trained.folder, approximate="1bit").status_code == 200
    served = administered.models[NAME]["adapter"]
    arguments = ["adapters", "inspect", str(trained.folder), "--model", str(tiny_model), "--approximate", "1bit"]
    facts = json.loads(motet(*arguments, "--json").stdout)
    assert facts["digest"] == served["version"]
    assert facts["error"]["change"] == served["error"]["change"]
    assert facts["error"]["logprobs"] is None
    table = motet(*arguments).stdout
    assert "1bit: misses" in table
    assert "missed of ΔW" in table
    plain = motet("adapters", "inspect", str(tiny_adapter), *arguments[3:])
    assert isinstance(plain.exception, ConfigError)


def test_verify_compares_the_lossy_form_with_its_own_merge(trained: Layout, tiny_model: Path) -> None:
    arguments = ["verify", str(trained.folder), "--model", str(tiny_model), "--dtype", "float32", "--json"]
    result = motet(*arguments, "--approximate", "1bit", "--tolerance", "0.001")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_difference"]["adapter"] < 0.001
