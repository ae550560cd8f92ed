"""A calibration replaces the old one at once or not at all, and leaves the weights as they are."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.adapters import recalibration
from motet.adapters.calibration import Calibration
from motet.adapters.errors import AdapterExistsError, ConfigError, ExportError, SourceChangedError
from motet.adapters.heads import HEAD_CONFIG, HEAD_WEIGHTS, HeadFile, read, write
from motet.adapters.recalibration import copied, in_place, uncalibrated
from tests.unit.adapters.test_heads import head_of, same

FOUND = Calibration(set="dev", n=100, ece=0.1, nll=0.5, brier=0.3, miss_rate=0.1)
FACTS: dict[str, Any] = {"n_train": 7, "seed": 3, "label_token_ids": (5, 6, 7)}


def calibrated(head: HeadFile) -> HeadFile:
    return replace(head, temperature=1.5, threshold=0.75, calibration=FOUND)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    write(head_of(temperature=2.0, **FACTS), made)
    (made / "pissa_init").mkdir()
    (made / "pissa_init" / "adapter_config.json").write_text("{}")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_in_place(folder: Path) -> None:
    before = contents(folder)
    in_place(calibrated(head_of(**FACTS)), folder)
    found = read(folder)
    assert found is not None
    assert same(found, calibrated(head_of(**FACTS)))
    after = contents(folder)
    assert after.keys() == before.keys(), "nothing is left behind"
    assert {name for name in after if after[name] != before[name]} == {HEAD_CONFIG}
    assert found.digest != head_of(temperature=2.0, **FACTS).digest


def test_what_training_left() -> None:
    assert same(uncalibrated(calibrated(head_of(**FACTS))), head_of(**FACTS))


def test_a_copy(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    copied(calibrated(head_of(**FACTS)), folder, tmp_path / "new" / "copy")
    assert contents(folder) == before
    after = contents(tmp_path / "new" / "copy")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {HEAD_CONFIG}
    found = read(tmp_path / "new" / "copy")
    assert found is not None
    assert found.calibration == FOUND
    mode = stat.S_IMODE((tmp_path / "new" / "copy").stat().st_mode)
    assert mode == stat.S_IMODE(folder.stat().st_mode)


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with pytest.raises(AdapterExistsError, match="'copy' is there already"):
        copied(calibrated(head_of(**FACTS)), folder, tmp_path / "copy")
    with pytest.raises(ExportError, match="inside the folder"):
        copied(calibrated(head_of(**FACTS)), folder, folder / "copy")
    assert not (folder / "copy").exists()


@pytest.mark.parametrize("change", [{"n_train": 8}, {"labels": ("a", "b", "c")}, {"tensors": head_of("dense").tensors}])
def test_another_head_is_not_calibrated(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    if "tensors" in change:
        change = {"tensors": {**change["tensors"], "W_mean": change["tensors"]["W_mean"] + 1e-6}}
    before = contents(folder)
    head = calibrated(head_of(**{**FACTS, **change}))
    with pytest.raises(SourceChangedError, match="calibrate again"):
        in_place(head, folder)
    with pytest.raises(SourceChangedError, match="calibrate again"):
        copied(head, folder, tmp_path / "copy")
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    (folder / HEAD_CONFIG).unlink()
    (folder / HEAD_WEIGHTS).unlink()
    with pytest.raises(SourceChangedError):
        in_place(head, folder)


def test_what_would_not_be_read_is_not_written(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match="temperature 0"):
        in_place(replace(calibrated(head_of(**FACTS)), temperature=0.0), folder)
    assert contents(folder) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_head(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Everything up to the last step may be cut short: before it the old file is whole."""
    before = contents(folder)

    def fails(*_: object) -> None:
        assert (folder / HEAD_CONFIG).read_bytes() == before[HEAD_CONFIG]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recalibration.os, step, fails)
    with pytest.raises(ExportError, match="No space left on device; the old one stands"):
        in_place(calibrated(head_of(**FACTS)), folder)
    with pytest.raises(ExportError, match="No space left"):
        copied(calibrated(head_of(**FACTS)), folder, tmp_path / "copy")
    assert contents(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
