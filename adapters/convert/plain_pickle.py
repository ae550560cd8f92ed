"""Reads a checkpoint that training left as a pickle, without running anything in it. Only offline converters need it.

Must not know: what the checkpoints hold, who wrote them. Beside tensors and plain values a checkpoint may hold the
options of its run, which argparse keeps in a Namespace; that is the one further type.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from motet.adapters.errors import UnsafeFormatError


def read_plain_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in the file, tensors on the CPU.

    Raises:
        UnsafeFormatError: it holds another type, is damaged, or is no dictionary of names.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the damage happens to cause, and advises to run the code
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else f"it cannot be read ({type(error).__name__})"
        raise UnsafeFormatError(
            f"{file.name} is no checkpoint of tensors and plain values: {reason}; save its tensors and options alone"
        ) from error
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise UnsafeFormatError(f"{file.name} holds a {type(saved).__name__}, not a dictionary of names")
    return saved


def read_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """As `read_plain_pickle`, of a dictionary that holds nothing but tensors.

    Raises:
        UnsafeFormatError: it holds anything else.
    """
    saved = read_plain_pickle(file)
    for name, value in saved.items():
        if not isinstance(value, torch.Tensor):
            raise UnsafeFormatError(
                f"{file.name} holds a {type(value).__name__} at {name!r}, not a tensor; save state_dict() alone"
            )
    return saved
