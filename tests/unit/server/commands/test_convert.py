"""`motet convert` from the command line: files in, a folder that loads out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig

from motet.adapters.errors import MissingTensorError, UnsupportedError
from motet.adapters.source import read
from motet.server.cli import cli
from tests.support import amt_vit
from tests.support.emtal_vit import official, tiny_vit
from tests.support.layouts_ilora import ilora
from tests.support.models import save_peft, tiny_llama
from tests.support.official_ilora import checkpoint, save_sasrec

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


@pytest.fixture
def emtal(tmp_path: Path) -> list[str]:
    """Arguments for a checkpoint that was saved after epoch 9, counted from 0."""
    model = tiny_vit()
    model.save_pretrained(tmp_path / "base")
    run = official(model)
    run.rest["epoch"] = 9
    run.save(tmp_path / "model_best.pth.tar")
    return ["convert", "emtal", *(str(tmp_path / name) for name in ("model_best.pth.tar", "base", "out"))]


def test_an_emtal_checkpoint_becomes_an_adapter(emtal: list[str], tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, [*emtal, "--fading-epochs", "10"], catch_exceptions=False).output
    assert printed == f"wrote {tmp_path / 'out'}\n"
    assert read(tmp_path / "out").config["peft_type"] == "LORA"


def test_an_emtal_checkpoint_fades_over_the_official_epochs(emtal: list[str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="convert one with 55 epochs behind it"):
        CliRunner().invoke(cli, emtal, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_fading_takes_an_epoch_at_least(emtal: list[str]) -> None:
    result = CliRunner().invoke(cli, [*emtal, "--fading-epochs", "0"])
    assert (result.exit_code, "0 is not in the range x>=1" in result.output) == (2, True)


def convert_amt(folder: Path, *names: str) -> str:
    arguments = [name if name.startswith("--") else str(folder / name) for name in names]
    return CliRunner().invoke(cli, ["convert", "amt", *arguments], catch_exceptions=False).output


def test_amt_checkpoints_become_a_pool(tmp_path: Path) -> None:
    amt_vit.made(tmp_path).checkpoints(tmp_path)
    printed = convert_amt(tmp_path, "best-0.pth", "best-1.pth", "best-2.pth", "dino.pth", "out")
    assert printed.splitlines() == [
        "scale_cls runs from 10 to 10.5 over the members; the mean was written",
        f"wrote {tmp_path / 'out'}: 3 members of rank 3",
    ]
    assert read(tmp_path / "out").config["members"] == 3


def test_an_amt_pool_in_one_file_is_named_for_a_model_with_a_head(tmp_path: Path) -> None:
    amt_vit.made(tmp_path).checkpoints(tmp_path, packed=True)
    printed = convert_amt(tmp_path, "merge.pth", "dino.pth", "out", "--prefix=vit.")
    assert printed == f"wrote {tmp_path / 'out'}: 3 members of rank 3\n"
    assert all(".vit.layers." in name for name in read(tmp_path / "out").tensors)


def test_an_amt_pool_without_a_start_says_so(tmp_path: Path) -> None:
    one = amt_vit.made(tmp_path)
    plain = amt_vit.Official(amt_vit.dino_names(one.model), one.pool.pairs, one.pool.scales_cls)
    amt_vit.save(plain.packed(), tmp_path / "merge.pth")
    printed = convert_amt(tmp_path, "merge.pth", "dino.pth", "out").splitlines()
    assert printed[0] == "the members were trained on the base itself: the pool has no start"


def test_a_pool_needs_a_checkpoint(tmp_path: Path) -> None:
    amt_vit.made(tmp_path)
    result = CliRunner().invoke(cli, ["convert", "amt", str(tmp_path / "dino.pth"), str(tmp_path / "out")])
    assert result.exit_code == 2


def test_an_ilora_checkpoint_becomes_an_adapter(tmp_path: Path) -> None:
    layout = ilora(tiny_llama(), tmp_path / "expected", statistics=False, linears=["q_proj"])
    torch.save(checkpoint(layout, projector=False), tmp_path / "last.ckpt")
    save_sasrec(layout.networks.sasrec, tmp_path / "sasrec.pt")
    arguments = [str(tmp_path / name) for name in ("last.ckpt", "sasrec.pt", "out")]
    result = CliRunner().invoke(cli, ["convert", "ilora", *arguments, "--base-name", "tiny"], catch_exceptions=False)
    assert result.output.splitlines() == [
        "left out: 3 tensors, gates of single layers, which the shared router replaces",
        "left out: 2 tensors, layers of SASRec that rank items",
        "the checkpoint has no statistics of batch norm: the router is evaluated with 0 and 1",
        "the checkpoint has no projector: items cannot stand for placeholder tokens",
        f"wrote {tmp_path / 'out'}: 3 linears",
    ]
    assert read(tmp_path / "out").config["base_model_name_or_path"] == "tiny"
