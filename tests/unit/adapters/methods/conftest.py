"""An adapter that was trained on a residual model, with everything that was left beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.layout import Layout
from tests.unit.adapters.conftest import Bench


@pytest.fixture
def begun(llama: Bench, tmp_path: Path) -> Layout:
    """A PiSSA adapter whose configuration says `true`, its start in a folder beside the residual model."""
    return llama.layout("pissa-residual-initial", tmp_path / "made")


@pytest.fixture
def residual(begun: Layout, tmp_path: Path) -> Path:
    """The residual model in one file."""
    made = begun.folder.parent / "residual"
    folder = tmp_path / "whole"
    folder.mkdir()
    shutil.copy(made / "config.json", folder)
    save_file(
        {k: v for shard in sorted(made.glob("*.safetensors")) for k, v in load_file(shard).items()},
        folder / "model.safetensors",
    )
    return folder


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"
