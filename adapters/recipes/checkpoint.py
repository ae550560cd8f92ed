"""An unfinished run in one file: tensors, losses, and the settings it belongs to.

Must not know: methods, the loop.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from motet.adapters.recipes.errors import CheckpointError
from motet.adapters.recipes.loop import State

FILE = "checkpoint.safetensors"
RANDOM = "random"
"""Name of torch's generator state among the tensors; no parameter is called so."""


def keep(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Write the state, or leave the previous file untouched: it appears by one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{FILE}.new"
    metadata = {"settings": json.dumps(settings), "losses": json.dumps(state.losses)}
    save_file({**state.tensors, RANDOM: torch.get_rng_state()}, new, metadata=metadata)
    os.replace(new, folder / FILE)


def take_up(folder: Path, settings: Mapping[str, Any]) -> State:
    """Read the state and set torch's generator to where it was.

    Raises:
        CheckpointError: there is none, it is damaged, or its run had other settings.
    """
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        theirs, losses = json.loads(metadata["settings"]), json.loads(metadata["losses"])
        random = tensors.pop(RANDOM)
    except FileNotFoundError as error:
        raise CheckpointError("there is no checkpoint to go on from; start again without --resume") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the checkpoint is damaged; remove the output folder and start again") from error
    ours = json.loads(json.dumps(settings))
    if changed := sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)):
        name = changed[0]
        raise CheckpointError(
            f"the checkpoint belongs to a run with {name}={theirs.get(name)!r}, not {ours.get(name)!r}; "
            "repeat its options, or start in another folder"
        )
    torch.set_rng_state(random)
    return State(tuple(losses), tensors)
