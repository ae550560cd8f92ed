"""CorDA in PEFT's layouts: without its start it is refused, and the converter trusts no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.convert.corda_cache import corda_cache
from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    MissingTensorError,
    ShapeError,
    UnsafeFormatError,
    UnsupportedError,
)
from tests.unit.adapters.conftest import Bench, edit, product
from tests.unit.adapters.methods.changes import Tensors, drop, replace_with

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["corda-ipm", "corda-kpm"])
def test_base_and_adapter_alone_are_never_enough(llama: Bench, tmp_path: Path, name: str) -> None:
    folder = llama.layout(name, tmp_path / "made").folder
    shutil.rmtree(folder / "corda_init")
    with pytest.raises(UnsupportedError, match=r"initial.*residual.*cache"):
        llama.lower(folder)


def test_lora_ga_alone_is_not_enough(llama: Bench, tmp_path: Path) -> None:
    folder = llama.layout("lora-ga", tmp_path / "made").folder
    shutil.rmtree(folder / "lora_ga_init")
    with pytest.raises(UnsupportedError, match=r"initial.*residual"):
        llama.lower(folder)


@pytest.mark.parametrize("name", ["corda-ipm", "lora-ga"])
def test_the_methods_own_configuration_betrays_it_although_init_says_true(
    llama: Bench, tmp_path: Path, name: str
) -> None:
    """People set `true` before they save, so that PEFT can load the folder again."""
    folder = llama.layout(name, tmp_path / "made").folder
    for start in folder.glob("*_init"):
        shutil.rmtree(start)
    edit(folder, config={"init_lora_weights": True})
    with pytest.raises(UnsupportedError, match="initial"):
        llama.lower(folder)


# ------------------------------------------------------------------------------------------------------- the SVD cache


@pytest.fixture
def cached(llama: Bench, tmp_path: Path) -> Path:
    """A folder with the cache and the adapter, beside what the converter made of them."""
    llama.layout("corda-cache", tmp_path / "made")
    return tmp_path / "made"


def _edit_cache(cached: Path, change: Callable[[Tensors], None]) -> None:
    file = cached / "cache" / "eigens.pt"
    cache = torch.load(file, weights_only=True)
    change(cache)
    torch.save(cache, file)


def test_the_converted_folder_is_the_adapter_and_its_start(cached: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (cached / "converted" / name).read_bytes() == (cached / "adapter" / name).read_bytes()
    assert json.loads((cached / "converted" / "corda_init" / "adapter_config.json").read_text())["r"] == 6
    assert sorted(path.name for path in (cached / "converted").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "corda_init",
    ]


def test_the_start_from_the_cache_is_pefts_own(llama: Bench, cached: Path) -> None:
    from_cache = llama.lower(cached / "converted")
    shutil.rmtree(cached / "converted" / "corda_init")
    shutil.copytree(cached / "start", cached / "converted" / "corda_init")
    from_peft = llama.lower(cached / "converted")
    for name in from_peft.effects:
        torch.testing.assert_close(product(from_cache, name), product(from_peft, name), atol=1e-7, rtol=1e-5)


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("content", ["code", "garbage", "empty", "not tensors", "a list"])
def test_a_cache_that_is_more_or_less_than_tensors_is_refused(cached: Path, content: str) -> None:
    file = cached / "cache" / "eigens.pt"
    match content:
        case "code":
            torch.save({**torch.load(file, weights_only=True), "more": Exploit(cached / "run")}, file)
        case "garbage":
            file.write_bytes(b"PK\x03\x04 no archive")
        case "empty":
            file.write_bytes(b"")
        case "not tensors":
            _edit_cache(cached, lambda cache: cache.__setitem__(f"{Q0}.eigens.S_WC", "text"))  # type: ignore[arg-type]
        case _:
            torch.save([torch.ones(3)], file)
    with pytest.raises(AdapterError) as caught:
        corda_cache(file, cached / "adapter", cached / "again")
    assert isinstance(caught.value, UnsafeFormatError | MissingTensorError | ShapeError)
    assert str(cached) not in str(caught.value)
    assert not (cached / "again").exists()
    assert not (cached / "run").exists(), "code of a pickle was run"


CACHES: dict[str, tuple[Callable[[Tensors], None], type[AdapterError], str]] = {
    "without a module": (drop(f"{Q0}.eigens.V_WC"), MissingTensorError, "V_WC"),
    "of another rank": (replace_with(f"{Q0}.eigens.S_WC", (5,)), ShapeError, "q_proj"),
    "of another width": (replace_with(f"{Q0}.eigens.V_WC", (47, 6)), ShapeError, "q_proj"),
    "with V transposed": (replace_with(f"{Q0}.eigens.V_WC", (6, 48)), ShapeError, "q_proj"),
}


@pytest.mark.parametrize(("change", "error", "message"), CACHES.values(), ids=CACHES.keys())
def test_a_cache_of_another_adapter_is_refused(
    cached: Path, change: Callable[[Tensors], None], error: type[AdapterError], message: str
) -> None:
    _edit_cache(cached, change)
    with pytest.raises(error, match=message):
        corda_cache(cached / "cache" / "eigens.pt", cached / "adapter", cached / "again")
    assert not (cached / "again").exists()


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_values_that_are_none_are_refused(llama: Bench, cached: Path, value: float) -> None:
    """By the converter, or when what it made is loaded."""
    _edit_cache(cached, lambda cache: cache[f"{Q0}.eigens.S_WC"].fill_(value))

    def convert_and_load() -> None:
        corda_cache(cached / "cache" / "eigens.pt", cached / "adapter", cached / "again")
        llama.lower(cached / "again")

    with pytest.raises(AdapterError):
        convert_and_load()


def test_a_cache_of_another_calibration_is_refused_when_it_is_loaded(
    llama: Bench, cached: Path, tmp_path: Path
) -> None:
    """Its shapes fit; that training began elsewhere shows only in the values."""
    generator = torch.Generator().manual_seed(1)

    def shuffle(cache: Tensors) -> None:
        for name, tensor in cache.items():
            if name.endswith("V_WC"):
                cache[name] = tensor[torch.randperm(len(tensor), generator=generator)]

    _edit_cache(cached, shuffle)
    corda_cache(cached / "cache" / "eigens.pt", cached / "adapter", cached / "again")
    with pytest.raises(ConfigError, match="initial adapter"):
        llama.lower(cached / "again")


def test_an_existing_folder_is_not_written_to(cached: Path) -> None:
    with pytest.raises(AdapterExistsError, match="converted"):
        corda_cache(cached / "cache" / "eigens.pt", cached / "adapter", cached / "converted")
