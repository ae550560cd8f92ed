"""Draws how often answers are right against how sure they were, before and after a calibration.

Must not know: heads, adapters. The only module that imports matplotlib, which is an extra; figures are made without
pyplot, so that no display is needed and nothing of a user's settings is changed.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from motet.server.heads.calibrating import Scored

INCHES = (9.0, 5.0)
DOTS_PER_INCH = 120


def require_drawable(file: Path) -> None:
    """Refuse a plot that could not be made, before anything is computed.

    Raises:
        click.ClickException: matplotlib is missing, or the file is there already or cannot be.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException('--plot needs the package matplotlib; pip install "motet[plots]", or leave it out')
    if file.suffix.lower() != ".png":
        raise click.ClickException(f"--plot {file.name!r} is a PNG and must end in .png")
    if file.exists():
        raise click.ClickException(f"--plot {file.name!r} is there already; name another file or remove it")
    if not file.parent.is_dir():
        raise click.ClickException(f"--plot {file.name!r} is to go into a folder that is not there; make it first")


def draw(file: Path, title: str, panels: Sequence[tuple[str, Scored]]) -> None:
    """Write a PNG with one panel for each: bars of accuracy over bins of confidence, and the bins' counts below.

    Raises:
        click.ClickException: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    axes: Any = figure.subplots(2, len(panels), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    for column, (name, scored) in enumerate(panels):
        _panel(axes[0][column], axes[1][column], name, scored)
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("rows")
    unfinished = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.png")
    try:
        figure.savefig(unfinished)
        os.replace(unfinished, file)
    except OSError as error:
        raise click.ClickException(
            f"--plot {file.name!r} cannot be written: {error.strerror}; choose another place"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _panel(above: Any, below: Any, name: str, scored: Scored) -> None:
    found = scored.reliability
    bins = len(found.count_B)
    lefts, width = [bin_ / bins for bin_ in range(bins)], 1 / bins
    filled = (found.count_B > 0).tolist()
    above.bar(lefts, found.accuracy_B.tolist(), width, align="edge", color="#8fb3d9", edgecolor="white")
    confidences, accuracies = (
        [value for value, some in zip(values.tolist(), filled, strict=True) if some]
        for values in (found.confidence_B, found.accuracy_B)
    )
    above.vlines(confidences, accuracies, confidences, color="#c44e52", label="gap to the mean confidence")
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    above.set(xlim=(0, 1), ylim=(0, 1), title=f"{name}: temperature {scored.temperature:.3g}, ECE {scored.ece:.3f}")
    above.legend(loc="upper left", fontsize="small")
    below.bar(lefts, found.count_B.tolist(), width, align="edge", color="#b0b0b0", edgecolor="white")
    below.set_xlabel("confidence: the largest probability")
