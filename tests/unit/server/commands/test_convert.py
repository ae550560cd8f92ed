"""`motet convert` from the command line: files in, a folder that loads out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig

from motet.adapters.errors import MissingTensorError
from motet.adapters.source import read
from motet.server.cli import cli
from tests.support.models import save_peft, tiny_llama

NAME = "model.layers.0.self_attn.q_proj"


def convert(folder: Path, cache: dict[str, torch.Tensor]) -> str:
    torch.save(cache, folder / "cache.pt")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], layers_to_transform=[0])
    save_peft(tiny_llama(), folder / "adapter", config, seed=1)
    arguments = [str(folder / name) for name in ("cache.pt", "adapter", "out")]
    return CliRunner().invoke(cli, ["convert", "corda-cache", *arguments], catch_exceptions=False).output


def test_a_cache_becomes_an_initial_adapter(tmp_path: Path) -> None:
    parts = {"S_WC": torch.ones(2), "U_WC": torch.ones(48, 2), "V_WC": torch.ones(48, 2)}
    printed = convert(tmp_path, {f"{NAME}.eigens.{part}": values for part, values in parts.items()})
    assert printed == f"wrote {tmp_path / 'out'}\n"
    assert read(tmp_path / "out").initial is not None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match="S_WC"):
        convert(tmp_path, {})
    assert not (tmp_path / "out").exists()
