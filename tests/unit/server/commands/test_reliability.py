"""The plot is an image of both panels, and is refused before any work where it cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image

from motet.server.commands import reliability
from motet.server.commands.reliability import DOTS_PER_INCH, INCHES, draw, require_drawable
from motet.server.heads.calibrating import Scored


def scored(gap: float, temperature: float = 1.0) -> Scored:
    """Of answers that are 90 % and 60 % sure, and right `gap` less often."""
    p_NC = torch.tensor([[0.9, 0.1]] * 100 + [[0.6, 0.4]] * 100, dtype=torch.float64)
    right = round(100 * (0.9 - gap)), round(100 * (0.6 - gap))
    y_N = torch.cat([(torch.arange(100) >= count).long() for count in right])
    return Scored.of(temperature, p_NC, y_N)


def pixels(file: Path) -> torch.Tensor:
    """[height, width, 3], from 0 to 255."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        image.verify()
    with Image.open(file) as image:
        width, height = image.size
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)


def bars(half: torch.Tensor) -> int:
    """Pixels of the colour of the bars of accuracy."""
    return int((half == torch.tensor([0x8F, 0xB3, 0xD9], dtype=torch.uint8)).all(-1).sum())


def test_an_image_of_both_panels(tmp_path: Path) -> None:
    draw(tmp_path / "plot.png", "adapter on dev", [("before", scored(0.3)), ("after", scored(0.0, 1.7))])
    image = pixels(tmp_path / "plot.png")
    assert list(image.shape[:2]) == [INCHES[1] * DOTS_PER_INCH, INCHES[0] * DOTS_PER_INCH]
    left, right = image.tensor_split(2, dim=1)
    assert 0 < bars(left) < bars(right), "it is right more often in the right panel"
    # Accuracies of 0.6 and 0.3 against 0.9 and 0.6; the dashes and gaps in front of the bars take a few pixels.
    assert bars(right) / bars(left) == pytest.approx(1.5 / 0.9, rel=0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_what_is_written_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: (drawn.append(figure), Path(file).touch()))
    draw(tmp_path / "plot.png", "adapter on dev", [("before", scored(0.3)), ("after", scored(0.0, 1.7))])
    above, below = drawn[0].axes[:2], drawn[0].axes[2:]
    titles = [axes.get_title() for axes in above]
    assert titles == ["before: temperature 1, ECE 0.300", "after: temperature 1.7, ECE 0.000"]
    assert drawn[0].get_suptitle() == "adapter on dev"
    for axes, accuracies in zip(above, ([0.6, 0.3], [0.9, 0.6]), strict=True):
        bars = {round(bar.get_x(), 3): bar.get_height() for bar in axes.patches if bar.get_height()}
        # 0.6 is at the end of bin 9 of 15, from 0.533; 0.9 within bin 14, from 0.867.
        assert bars == pytest.approx({0.867: accuracies[0], 0.533: accuracies[1]})
    for axes in below:
        assert [round(bar.get_height()) for bar in axes.patches if bar.get_height()] == [100, 100]


def test_matplotlib_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(click.ClickException, match=r'pip install "motet\[plots\]", or leave it out'):
        require_drawable(tmp_path / "plot.png")


def test_half_a_plot_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reliability.os, "replace", fails)
    with pytest.raises(click.ClickException, match="No space left on device; choose another"):
        draw(tmp_path / "plot.png", "", [("before", scored(0.1))])
    assert list(tmp_path.iterdir()) == []


def test_where_no_plot_can_be(tmp_path: Path) -> None:
    (tmp_path / "old.png").touch()
    for name, said in [("plot.pdf", r"must end in \.png"), ("old.png", "already"), ("none/plot.png", "not there")]:
        with pytest.raises(click.ClickException, match=said):
            require_drawable(tmp_path / name)
    require_drawable(tmp_path / "plot.PNG")
    with pytest.raises(click.ClickException, match="cannot be written"):
        draw(tmp_path / "none" / "plot.png", "", [("before", scored(0.1))])
