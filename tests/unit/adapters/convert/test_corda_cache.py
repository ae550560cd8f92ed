"""The offline converter takes tensors from a pickle and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from motet.adapters.convert.corda_cache import corda_cache
from motet.adapters.errors import AdapterError, AdapterExistsError, MissingTensorError, ShapeError, UnsafeFormatError
from motet.adapters.source import read
from tests.support.models import save_peft, tiny_llama
from tests.unit.adapters.conftest import edit

RANK, WIDTH = 3, 48


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[0])
    return edit(save_peft(tiny_llama(), tmp_path / "adapter", config, seed=1), config={"init_lora_weights": "corda"})


def cache_of(**changes: Any) -> dict[str, Any]:
    stem = "model.layers.0.self_attn.q_proj.eigens"
    parts = {
        f"{stem}.S_WC": torch.tensor([4.0, 2.0, 1.0]),
        f"{stem}.U_WC": torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(1)),
        f"{stem}.V_WC": torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(2)),
    }
    return {**parts, **{f"{stem}.{name}": value for name, value in changes.items()}}


def test_the_start_is_that_of_the_cache(adapter: Path, tmp_path: Path) -> None:
    cache = cache_of()
    torch.save(cache, tmp_path / "cache.pt")
    corda_cache(tmp_path / "cache.pt", adapter, tmp_path / "out")
    files = read(tmp_path / "out")
    assert files.initial is not None
    assert files.initial_folder == "corda_init"
    values, u_OR, v_IR = cache.values()
    a_RI, b_OR = (files.initial.tensors[name] for name in sorted(files.initial.tensors))
    expected_OI = u_OR @ torch.diag(values) @ v_IR.T
    torch.testing.assert_close(2 * b_OR @ a_RI, expected_OI)  # the scale is alpha / r = 2
    assert {name: t.tolist() for name, t in files.tensors.items()} == {
        name: t.tolist() for name, t in read(adapter).tensors.items()
    }


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("code of a pickle was run",))


def test_a_pickle_that_runs_code_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache.pt").write_bytes(pickle.dumps(Hostile()))
    refused(adapter, tmp_path, UnsafeFormatError, "no checkpoint of tensors and plain values")
    torch.save({"x": Hostile()}, tmp_path / "cache.pt")
    refused(adapter, tmp_path, UnsafeFormatError, "no checkpoint of tensors and plain values")
    assert "was run" not in capsys.readouterr().out


def test_a_cache_of_another_model(adapter: Path, tmp_path: Path) -> None:
    torch.save({"model.layers.7.x.eigens.S_WC": torch.ones(3)}, tmp_path / "cache.pt")
    refused(adapter, tmp_path, MissingTensorError, "has no 'model.layers.0.self_attn.q_proj.eigens.S_WC'")


@pytest.mark.parametrize("changes", [{"S_WC": torch.ones(4)}, {"U_WC": torch.ones(47, 3)}, {"V_WC": torch.ones(48, 2)}])
def test_a_cache_of_another_rank_or_width(adapter: Path, tmp_path: Path, changes: dict[str, torch.Tensor]) -> None:
    torch.save(cache_of(**changes), tmp_path / "cache.pt")
    refused(adapter, tmp_path, ShapeError, "do not belong together")


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path) -> None:
    torch.save(cache_of(), tmp_path / "cache.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterExistsError, match="there already"):
        corda_cache(tmp_path / "cache.pt", adapter, tmp_path / "out")


def refused(adapter: Path, tmp_path: Path, error: type[AdapterError], message: str) -> None:
    with pytest.raises(error, match=message):
        corda_cache(tmp_path / "cache.pt", adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "cache.pt"]
