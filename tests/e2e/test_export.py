"""An adapter leaves the server as a folder that PEFT and the server itself read."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import load_file

from motet.server.cli import cli, main
from tests.e2e.process import ADMIN_KEY, Server
from tests.support.layout import Layout
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES

PROMPT = list(range(60, 100))


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, administered: Server) -> Any:
    """`motet export` as the server's administrator."""
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("MOTET_URL", administered.url)

    def call(source: str, out: Path, *arguments: str) -> Result:
        return CliRunner().invoke(cli, ["export", source, "--to", "peft", str(out), *arguments], catch_exceptions=False)

    return call


@pytest.fixture
def out(tiny_root: Path, administered: Server) -> Iterator[Path]:
    """A folder that the server may load."""
    folder = tiny_root / "exported"
    yield folder
    if "again" in administered.models:
        administered.unload("again")
    shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def peft_logprobs(tiny_model: Path, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_dense(tiny_model, torch.float32), str(folder)).eval()
    rows = model(input_ids=torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["tuned", "on-residual"])
def test_a_served_adapter_is_a_plain_lora_elsewhere(
    export: Any, administered: Server, tiny_model: Path, out: Path, name: str
) -> None:
    result = export(name, out)
    assert result.exit_code == 0, result.output
    served = torch.tensor(administered.prompt_logprobs(name, PROMPT))
    tolerance = TOLERANCES["log-probabilities", torch.float32]
    tolerance.assert_close(peft_logprobs(tiny_model, out), served)
    response = administered.load("again", "exported")
    assert response.status_code == 200, response.text
    tolerance.assert_close(torch.tensor(administered.prompt_logprobs("again", PROMPT)), served)


def test_a_folder_is_exported_like_the_served_adapter(
    export: Any, residual_layout: Layout, tiny_model: Path, tmp_path: Path
) -> None:
    assert export("on-residual", tmp_path / "by-name").exit_code == 0
    declared = ["--residual", str(residual_layout.declared.residual), "--model", str(tiny_model)]
    result = export(str(residual_layout.folder), tmp_path / "by-folder", *declared)
    assert result.exit_code == 0, result.output
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("by-name", "by-folder"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


def test_bfloat16(export: Any, tmp_path: Path) -> None:
    assert export("tuned", tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_unknown_name(export: Any, tmp_path: Path) -> None:
    result = export("nobody", tmp_path / "out")
    assert result.exit_code == 1
    assert "404: adapter 'nobody' is not loaded" in result.stderr
    assert not (tmp_path / "out").exists()


def test_declarations_belong_to_folders(export: Any, tmp_path: Path) -> None:
    result = export("tuned", tmp_path / "out", "--trained-on-base")
    assert result.exit_code == 2
    assert "'tuned' is no folder here" in result.stderr


def test_a_folder_that_holds_something_is_left_alone(
    administered: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setattr(
        sys, "argv", ["motet", "export", "tuned", "--to", "peft", str(tmp_path), "--url", administered.url]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
