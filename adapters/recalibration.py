"""Writes what a calibration changes of a head: in its own folder, or in a copy.

Must not know: how calibration is done. Only HEAD_CONFIG changes, and it is replaced in one step: whatever happens
meanwhile, a reader finds the old head or the new one.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from motet.adapters.convert.folder import new_folder, require_new
from motet.adapters.errors import ExportError, SourceChangedError
from motet.adapters.heads import HEAD_CONFIG, HeadFile, checked, dump, read


def uncalibrated(head: HeadFile) -> HeadFile:
    """The head as training left it."""
    return replace(head, temperature=1.0, threshold=None, calibration=None)


def in_place(head: HeadFile, folder: Path) -> None:
    """Replace the calibration in the folder that the head was read from.

    Raises:
        SourceChangedError: the folder has another head now.
        ExportError: it cannot be written.
        FormatError: the head would not be read again.
    """
    config, _ = dump(checked(head))
    now = read(folder)
    if now is None or uncalibrated(now).digest != uncalibrated(head).digest:
        raise SourceChangedError(
            f"the head in {folder.name!r} is another than the one that was calibrated; calibrate again"
        )
    unfinished = folder / f".{HEAD_CONFIG}.{uuid.uuid4().hex}"
    try:
        with unfinished.open("xb") as file:
            file.write(config)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / HEAD_CONFIG)
    except OSError as error:
        raise ExportError(
            f"{HEAD_CONFIG} of {folder.name!r} cannot be replaced: {error.strerror}; the old one stands"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def require_place(folder: Path, out_folder: Path) -> None:
    """Refuse a place for a copy of the folder, before any work is done.

    Raises:
        AdapterExistsError: there is something already.
        ExportError: it is inside the folder.
    """
    require_new(out_folder)
    if out_folder.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"{out_folder.name!r} would be inside the folder it is a copy of; choose another place")


def copied(head: HeadFile, folder: Path, out_folder: Path) -> None:
    """Copy the folder that the head was read from, with the head's calibration; it appears whole or not at all.

    Raises:
        AdapterExistsError, SourceChangedError, ExportError, FormatError: as `require_place` and `in_place`.
    """
    require_place(folder, out_folder)
    try:
        with new_folder(out_folder) as made:
            shutil.copytree(folder, made, dirs_exist_ok=True)
            in_place(head, made)
    except OSError as error:  # copytree gathers its errors and leaves strerror empty
        raise ExportError(
            f"{out_folder.name!r} cannot be written: {error.strerror or 'not every file can be copied'}; "
            "choose another place"
        ) from error
