"""What is declared beside a folder reaches the served model: from the command line, over HTTP, at the start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from motet.server.cli import cli
from tests.e2e.process import ADMIN_KEY, Server
from tests.support.layout import Layout
from tests.support.tolerances import TOLERANCES

PROMPT = list(range(40, 80))
NAME = "declared"


@pytest.fixture(autouse=True)
def leaves_nothing_behind(administered: Server) -> Iterator[None]:
    models = set(administered.models)
    yield
    if NAME in administered.models:
        administered.unload(NAME)
    assert set(administered.models) == models


@torch.no_grad()
def expected(oracle: Any) -> torch.Tensor:
    logprobs = oracle(input_ids=torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    found: torch.Tensor = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    return found


def assert_served(server: Server, name: str, layout: Layout) -> None:
    served = torch.tensor(server.prompt_logprobs(name, PROMPT))
    tolerance = TOLERANCES["log-probabilities", torch.float32]
    tolerance.assert_close(served, expected(layout.oracle))
    base = torch.tensor(server.prompt_logprobs("tiny", PROMPT))
    assert float((served - base).abs().max()) > 50 * tolerance.atol, "the adapter does nothing: the test says nothing"


def test_declared_at_the_start(administered: Server, residual_layout: Layout) -> None:
    assert_served(administered, "on-residual", residual_layout)
    assert administered.models["on-residual"]["adapter"]["method"] == residual_layout.method


def test_declared_over_http(administered: Server, residual_layout: Layout, tiny_root: Path) -> None:
    residual = residual_layout.declared.residual
    assert residual is not None
    response = administered.load(
        NAME, residual_layout.folder.relative_to(tiny_root), residual_path=str(residual.relative_to(tiny_root))
    )
    assert response.status_code == 200, response.text
    assert_served(administered, NAME, residual_layout)
    versions = {name: administered.models[name]["adapter"]["version"] for name in (NAME, "on-residual")}
    assert len(set(versions.values())) == 1


def test_undeclared_it_is_refused(administered: Server, residual_layout: Layout) -> None:
    """Served as plain LoRA it would count the base's own part twice."""
    response = administered.load(NAME, residual_layout.folder)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_refused")
    assert "residual" in response.json()["error"]["message"]


def test_the_opposite_declaration_is_believed_and_another_version(
    administered: Server, residual_layout: Layout
) -> None:
    assert administered.load(NAME, residual_layout.folder, trained_on_base=True).status_code == 200
    models = administered.models
    assert models[NAME]["adapter"]["version"] != models["on-residual"]["adapter"]["version"]


def test_declared_on_the_command_line(
    administered: Server, residual_layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    arguments = ["adapters", "load", NAME, str(residual_layout.folder), "--url", administered.url, "--json"]
    refused = CliRunner().invoke(cli, arguments)
    assert (refused.exit_code, refused.stdout) == (1, "")
    loaded = CliRunner().invoke(
        cli, [*arguments, "--residual", str(residual_layout.declared.residual)], catch_exceptions=False
    )
    assert loaded.exit_code == 0, loaded.output
    assert_served(administered, NAME, residual_layout)


def test_inspect_takes_declarations_too(administered: Server, residual_layout: Layout, tiny_model: Path) -> None:
    arguments = ["adapters", "inspect", str(residual_layout.folder), "--model", str(tiny_model), "--json"]
    arguments += ["--residual", str(residual_layout.declared.residual)]
    facts = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert facts["method"] == residual_layout.method
    assert facts["digest"] == administered.models["on-residual"]["adapter"]["version"]
