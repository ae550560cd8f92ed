"""Head files are made from what vbll saves, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from vbll import DiscClassification, GenClassification, HetClassification, tDiscClassification

from motet.adapters.convert.head import vbll_head
from motet.adapters.errors import (
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsafeFormatError,
    UnsupportedError,
)
from motet.adapters.heads import HEAD_CONFIG, HEAD_WEIGHTS, HeadFile, Parameterization, read
from motet.server.cli import cli
from tests.unit.adapters.test_heads import LABELS, C, D, R, head_of, same


def layer(kind: str) -> Any:
    torch.manual_seed(3)
    return DiscClassification(D, C, 0.1, parameterization=kind, cov_rank=R)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "lowrank"])
def test_a_state_dict_of_vbll(tmp_path: Path, kind: str, suffix: str) -> None:
    made, file = layer(kind), tmp_path / f"head{suffix}"
    state = {f"out.{name}": tensor for name, tensor in made.state_dict().items()} | {"body.weight": torch.ones(2)}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    arguments = ["--parameterization", kind, "--labels", "no,maybe,oui ✓", "--token-ids", "5,0,7", "--prefix", "out."]
    command = [
        "convert",
        "vbll-head",
        str(file),
        str(tmp_path / "out"),
        *arguments,
        "--n-train",
        "10",
        "--temperature",
        "2",
    ]
    printed = CliRunner().invoke(cli, command, catch_exceptions=False).output
    assert printed == f"wrote {HEAD_CONFIG} and {HEAD_WEIGHTS} to {tmp_path / 'out'}\n"
    facts = {"label_token_ids": (5, 0, 7), "n_train": 10, "temperature": 2.0}
    found = read(tmp_path / "out")
    assert found is not None
    assert same(found, head_of(kind, tensors=made.state_dict(), **facts))


def test_token_ids_are_numbers(tmp_path: Path) -> None:
    torch.save(layer("dense").state_dict(), tmp_path / "head.pt")
    command = ["convert", "vbll-head", str(tmp_path / "head.pt"), str(tmp_path / "out")]
    result = CliRunner().invoke(
        cli, [*command, "--parameterization", "dense", "--labels", "a,b,c", "--token-ids", "1,x"]
    )
    assert result.exit_code == 2
    assert "--token-ids" in result.output


def converted(folder: Path, state: object, kind: str = "dense", **options: Any) -> HeadFile:
    torch.save(state, folder / "head.pt")
    return vbll_head(folder / "head.pt", folder / "out", Parameterization(kind), LABELS, **options)


@pytest.mark.parametrize("other", [tDiscClassification, HetClassification, GenClassification])
def test_other_layers_are_refused_by_name(tmp_path: Path, other: Any) -> None:
    with pytest.raises(UnsupportedError, match=other.__name__):
        converted(tmp_path, other(D, C, 0.1, parameterization="diagonal").state_dict(), "diagonal")


def test_a_state_dict_is_only_what_was_declared(tmp_path: Path) -> None:
    state = layer("dense").state_dict()
    with pytest.raises(ShapeError, match="check the parameterization"):
        converted(tmp_path, state, "lowrank")
    with pytest.raises(UnmatchedTensorError, match="W_offdiag"):
        converted(tmp_path, state, "diagonal")
    with pytest.raises(UnmatchedTensorError, match="extra"):
        converted(tmp_path, {**state, "extra": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"starts with 'head\.'; it has 'W_logdiag', 'W_mean'"):
        converted(tmp_path, state, prefix="head.")
    with pytest.raises(ConfigError, match="threshold 2"):
        converted(tmp_path, state, threshold=2)
    assert not (tmp_path / "out").exists()


def test_other_dtypes_become_float32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in layer("dense").state_dict().items()}
    head = converted(tmp_path, state)
    assert {name: tensor.tolist() for name, tensor in head.tensors.items()} == {n: t.tolist() for n, t in state.items()}
    double = replace(head, tensors={name: tensor.double() for name, tensor in head.tensors.items()})
    with pytest.raises(NonFiniteError, match="too large for float32"):
        converted(tmp_path, {**double.tensors, "W_mean": double.tensors["W_mean"] + 1e39})
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        converted(tmp_path, {**state, "W_mean": torch.ones(C, D, dtype=torch.int64)})


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("code of a pickle was run",))


@pytest.mark.parametrize("state", [Hostile(), {"W_mean": Hostile()}, [1, 2], {"W_mean": 3}])
def test_more_than_tensors_is_refused(tmp_path: Path, state: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsafeFormatError, match=r"no checkpoint of tensors and plain values|holds a (list|int)"):
        converted(tmp_path, state)
    assert "was run" not in capsys.readouterr().out
