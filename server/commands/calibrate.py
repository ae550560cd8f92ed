"""`motet calibrate`: fits an output head's temperature and threshold on labelled rows.

Must not know: how anything is computed.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from motet.adapters.spec import Declared, LossyForm
from motet.server.commands import options
from motet.server.commands.terminal import console, stages
from motet.server.config import ServeConfig

if TYPE_CHECKING:
    from motet.adapters.heads import HeadFile
    from motet.server.heads.calibrating import Calibrated, Scored

SCORES = (("ECE", "ece"), ("NLL", "nll"), ("Brier", "brier"), ("accuracy", "accuracy"))


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--data",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help='JSON Lines that training has not seen: {"text": "…", "label": "…"}, or "messages" for "text".',
)
@click.option("--out", type=click.Path(path_type=Path), help="Write a calibrated copy of FOLDER to this new folder.")
@click.option("--in-place", is_flag=True, help="Write the calibration into FOLDER itself.")
@click.option(
    "--miss-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Of new requests at most this share is abstained from.",
)
@click.option("--set", "name", help="What to call the rows.  [default: the file's name]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the two halves.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw reliability to this PNG.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What to serve FOLDER in; calibrate in what you serve in.",
)
@options.declarations(Path)
@options.model
@options.as_json
def calibrate(
    folder: Path,
    file: Path,
    out: Path | None,
    in_place: bool,
    miss_rate: float,
    name: str | None,
    seed: int,
    plot: Path | None,
    dtype: str,
    initial: Path | None,
    residual: Path | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Fit temperature and abstention threshold of the output head in FOLDER.

    One half of the rows chooses the temperature, the other the threshold; the scores are of the second half. The
    features are those that a server computes with this adapter, base model and dtype.
    """
    if in_place == (out is not None):
        raise click.UsageError("say where the calibration goes: --out FOLDER for a copy, or --in-place; one of them")
    import torch

    from motet.adapters import heads, recalibration
    from motet.adapters.calibration import Calibration, require_set
    from motet.server.commands import features, labelled, reliability
    from motet.server.heads import calibrating
    from motet.server.heads.batch import Head, Row, logits
    from motet.server.heads.errors import HeadError

    report, set_name = stages(as_json), file.stem if name is None else name
    require_set("--set", set_name)
    if out is not None:
        recalibration.require_place(folder, out)
    if plot is not None:
        reliability.require_drawable(plot)
    if (head := heads.read(folder)) is None:
        raise click.ClickException(
            f"{folder.name!r} has no output head; put one beside it with motet convert vbll-head"
        )
    rows = labelled.read_rows(file, head.labels)
    try:
        calibrating.require_enough(len(rows), miss_rate)
        declared = Declared(initial, residual, trained_on_base, approximate)
        config = ServeConfig(model=model, dtype=dtype)
        x_ND = features.features_of(config, folder, declared, rows, head.width, report)
        report("fitting")
        layer = Head.of(recalibration.uncalibrated(head), x_ND.device)
        y_N = torch.tensor([row.label for row in rows])
        found = calibrating.calibrate(logits([Row(layer, x_D) for x_D in x_ND]), y_N, head.temperature, miss_rate, seed)
    except HeadError as error:
        raise click.ClickException(str(error)) from error
    after = found.after
    fitted = replace(
        head,
        temperature=after.temperature,
        threshold=found.threshold,
        calibration=Calibration(
            set=set_name, n=found.scored, ece=after.ece, nll=after.nll, brier=after.brier, miss_rate=miss_rate
        ),
    )
    if plot is not None:
        title = f"{folder.resolve().name} on {set_name}: {found.scored:,} rows that the temperature has not seen"
        reliability.draw(plot, title, [("before", found.before), ("after", after)])
    if out is None:
        recalibration.in_place(fitted, folder)
    else:
        recalibration.copied(fitted, folder, out)
    if as_json:
        click.echo(json.dumps(_body(found, fitted)))
    else:
        _print(found, fitted, folder if out is None else out, plot)


def _body(found: Calibrated, head: HeadFile) -> dict[str, Any]:
    assert head.calibration is not None
    return {
        "head": head.digest,
        "set": head.calibration.set,
        "rows": {"temperature": found.fitted, "scores": found.scored},
        "before": _scores(found.before),
        "after": _scores(found.after),
        "miss_rate": found.miss_rate,
        "threshold": found.threshold,
        "abstained": found.abstained,
        "kept_accuracy": found.kept_accuracy,
    }


def _scores(scored: Scored) -> dict[str, float | None]:
    values = {name: getattr(scored, name) for name in ("temperature", *(name for _, name in SCORES))}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _print(found: Calibrated, head: HeadFile, written: Path, plot: Path | None) -> None:
    assert head.calibration is not None
    console.print(
        f"{found.fitted:,} rows of {head.calibration.set!r} chose the temperature; the other {found.scored:,} are "
        "scored here and chose the threshold",
        markup=False,
        soft_wrap=True,
    )
    table = Table("", "before", "after", box=None, pad_edge=False)
    for label, attribute in (("temperature", "temperature"), *SCORES):
        table.add_row(label, *(f"{getattr(scored, attribute):.4g}" for scored in (found.before, found.after)))
    console.print(table)
    kept = "" if found.kept_accuracy is None else f"; accuracy of the rest {found.kept_accuracy:.4g}"
    console.print(
        f"threshold {found.threshold:.4g} for a miss rate of {found.miss_rate:g}: {found.abstained:.1%} of the scored "
        f"rows are above it{kept}",
        soft_wrap=True,
    )
    if found.threshold >= 1 - 1 / len(head.labels):
        console.print(
            f"with {len(head.labels)} labels no answer is above it: the head never abstains; a larger --miss-rate "
            "lowers the threshold",
            soft_wrap=True,
        )
    for path in (written, plot):
        if path is not None:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
    console.print(f"the head is {head.digest[:12]} now", markup=False)
