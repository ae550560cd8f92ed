"""Lines of results: when and with what they were measured, and their file. Knows nothing of what is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.machine import Machine


def surroundings(*packages: str) -> dict[str, Any]:
    """What a line begins with, to be asked for before it is measured: the time, the machine, its load, versions."""
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(Machine.here()),
        "versions": {package: version(package) for package in packages},
        "load_before": os.getloadavg(),
    }


def append(file: Path, *lines: Mapping[str, object]) -> None:
    """Raises ValueError: a figure is not a finite number, which JSON has no word for."""
    texts = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines]
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(texts)
