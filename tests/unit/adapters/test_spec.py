"""What is declared of a folder is read with it, belongs to its digest, and may not contradict itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save

from motet.adapters.checkpoint import MODEL_CONFIG, WHOLE
from motet.adapters.errors import AdapterError, ConfigError, SourceNotFoundError, UnsafePathError
from motet.adapters.source import INITIAL_FOLDERS, read
from motet.adapters.spec import Declared
from tests.unit.adapters.test_source import TENSORS, write


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / MODEL_CONFIG).write_text("{}")
    (folder / WHOLE).write_bytes(save(TENSORS))
    return folder


@pytest.mark.parametrize("name", INITIAL_FOLDERS)
def test_a_sub_folder_is_the_initial_adapter(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "adapter")
    alone = read(folder)
    write(folder / name, config=b'{"r": 5}')
    files = read(folder)
    assert files.initial is not None
    assert files.initial.config == {"r": 5}
    assert files.initial_folder == name
    assert (alone.initial, alone.initial_folder) == (None, None)
    assert files.digest != alone.digest


def test_a_declared_initial_adapter_goes_before_a_sub_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    write(folder / "pissa_init")
    files = read(folder, Declared(initial=write(tmp_path / "other", config=b'{"r": 6}')))
    assert files.initial is not None
    assert files.initial.config == {"r": 6}
    assert files.initial_folder is None


def test_every_declaration_changes_the_digest(tmp_path: Path) -> None:
    folder, other, model = write(tmp_path / "a"), write(tmp_path / "b"), model_folder(tmp_path / "m")
    declarations = [
        Declared(),
        Declared(initial=other),
        Declared(residual=model),
        Declared(initial=other, residual=model),
        Declared(trained_on_base=True),
    ]
    assert len({read(folder, declared).digest for declared in declarations}) == len(declarations)
    before = read(folder, Declared(initial=other)).digest
    write(other, config=b'{"r": 7}')
    assert read(folder, Declared(initial=other)).digest != before


REFUSED: dict[str, tuple[str, str, type[AdapterError], str]] = {
    "an initial model": ("initial", "model", ConfigError, "initial adapter .* is of kind 'model directory'"),
    "a residual adapter": ("residual", "adapter", ConfigError, "residual model .* is of kind 'adapter'"),
    "a missing one": ("initial", "nowhere", SourceNotFoundError, "'nowhere' is not a folder"),
}


@pytest.mark.parametrize(("field", "name", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_declaration_of_the_wrong_kind(
    tmp_path: Path, field: str, name: str, error: type[AdapterError], message: str
) -> None:
    folder = write(tmp_path / "adapter")
    model_folder(tmp_path / "model")
    with pytest.raises(error, match=message):
        read(folder, Declared(**{field: tmp_path / name}))


@pytest.mark.parametrize("field", ["initial", "residual"])
def test_contradictory_declarations(tmp_path: Path, field: str) -> None:
    folder = write(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="trained_on_base contradicts"):
        read(folder, Declared(**{field: tmp_path}, trained_on_base=True))


def test_a_sub_folder_contradicts_trained_on_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    write(folder / "corda_init")
    with pytest.raises(ConfigError, match="trained_on_base contradicts"):
        read(folder, Declared(trained_on_base=True))


def test_a_sub_folder_that_leaves_is_refused(tmp_path: Path) -> None:
    folder, outside = write(tmp_path / "adapter"), write(tmp_path / "outside")
    (folder / "pissa_init").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="pissa_init is a link that leaves"):
        read(folder)
