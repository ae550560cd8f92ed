"""`motet convert`: makes files that training leaves as pickles loadable, once, offline.

Must not know: formats. The server itself never reads a pickle.
"""

from __future__ import annotations

from pathlib import Path

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def convert() -> None:
    """Convert what training left as a pickle; only tensors are read from it."""


@convert.command(name="corda-cache")
@click.argument("cache", type=FILE)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
def corda_cache(cache: Path, adapter: Path, out: Path) -> None:
    """Write OUT: the CorDA folder ADAPTER with its start from CACHE, CorDA's file of singular values."""
    from motet.adapters.convert.corda_cache import corda_cache as write

    write(cache, adapter, out)
    click.echo(f"wrote {out}")


@convert.command(name="emtal")
@click.argument("checkpoint", type=FILE)
@click.argument("base", type=FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--fading-epochs",
    type=click.IntRange(min=1),
    default=55,
    show_default=True,
    help="After how many epochs the router had faded.",
)
def emtal(checkpoint: Path, base: Path, out: Path, fading_epochs: int) -> None:
    """Write OUT: a LoRA folder from CHECKPOINT, a vision transformer as EMTAL's code leaves it.

    BASE is the ViT it was trained on, as transformers saves it. OUT is for ViTForImageClassification.
    """
    from motet.adapters.convert.emtal import convert as write

    write(checkpoint, base, out, fading_epochs)
    click.echo(f"wrote {out}")


@convert.command(name="amt")
@click.argument("checkpoints", type=FILE, nargs=-1, required=True)
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--prefix", help='Before "layers" in module paths; default: as in BASE if a folder, else nothing.')
def amt(checkpoints: tuple[Path, ...], base: Path, out: Path, prefix: str | None) -> None:
    """Write OUT: an AMT pool from CHECKPOINTS, one a member as AMT's code leaves it, or one of the whole pool.

    BASE is the ViT it was trained on: a folder as transformers saves it, or a file by DINO's or timm's names.
    """
    from motet.adapters.convert.amt import convert as write

    pool = write(checkpoints, base, out, prefix=prefix)
    scales = pool.scales_cls
    if max(scales) > min(scales):
        click.echo(f"scale_cls runs from {min(scales):.4g} to {max(scales):.4g} over the members; the mean was written")
    if not pool.started:
        click.echo("the members were trained on the base itself: the pool has no start")
    click.echo(f"wrote {out}: {pool.members} members of rank {pool.rank}")


@convert.command(name="ilora")
@click.argument("checkpoint", type=FILE)
@click.argument("sasrec", type=FILE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base-name", help="The base model's name, for the configuration; default: as the checkpoint has it.")
def ilora(checkpoint: Path, sasrec: Path, out: Path, base_name: str | None) -> None:
    """Write OUT: an iLoRA folder from CHECKPOINT, the .ckpt that iLoRA's code leaves.

    SASREC is the sequence model it was trained with, a whole module as the same code reads it.
    """
    from motet.adapters.convert.ilora import ilora_checkpoint as write

    found = write(checkpoint, sasrec, out, base_name=base_name)
    for what, count in found.left_out.items():
        click.echo(f"left out: {count} tensors, {what}")
    if not found.statistics:
        click.echo("the checkpoint has no statistics of batch norm: the router is evaluated with 0 and 1")
    if not found.projected:
        click.echo("the checkpoint has no projector: items cannot stand for placeholder tokens")
    click.echo(f"wrote {out}: {found.pairs} linears")


@convert.command(name="vbll-head")
@click.argument("state", type=FILE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--parameterization",
    type=click.Choice(["dense", "diagonal", "lowrank"]),
    required=True,
    help="As given to DiscClassification; the state dict does not say it.",
)
@click.option("--labels", required=True, help="What the classes are called, in their order: A,B,C,D.")
@click.option("--token-ids", help="The token that says each label, in the same order: 330,365,340,422.")
@click.option("--prefix", default="", help="What stands before the layer's names in STATE: out_layer.")
@click.option("--n-train", type=int, help="How many examples it was trained on.")
@click.option("--prior-scale", type=float, help="As given to DiscClassification.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="What the logits are divided by.")
def vbll_head(
    state: Path,
    out: Path,
    parameterization: str,
    labels: str,
    token_ids: str | None,
    prefix: str,
    n_train: int | None,
    prior_scale: float | None,
    temperature: float,
) -> None:
    """Put the head of STATE, the state dict of a vbll DiscClassification, into OUT, an adapter's folder."""
    from motet.adapters.convert.head import vbll_head as write
    from motet.adapters.heads import HEAD_CONFIG, HEAD_WEIGHTS, Parameterization

    try:
        ids = None if token_ids is None else tuple(int(token) for token in token_ids.split(","))
    except ValueError as error:
        raise click.BadParameter("give whole numbers with commas between", param_hint="--token-ids") from error
    write(
        state,
        out,
        Parameterization(parameterization),
        tuple(labels.split(",")),
        prefix=prefix,
        label_token_ids=ids,
        n_train=n_train,
        prior_scale=prior_scale,
        temperature=temperature,
    )
    click.echo(f"wrote {HEAD_CONFIG} and {HEAD_WEIGHTS} to {out}")
