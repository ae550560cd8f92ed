"""Which adapters a running Motet has. Knows nothing of speed."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ADMIN_KEY = "key-of-the-benchmark"


def register(url: str, folders: Sequence[Path]) -> None:
    """Load and unload until the server has exactly these, each named as its folder.

    Raises:
        HTTPError: the server refused.
    """
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        present = {model["id"] for model in json.load(answer)["data"] if model["parent"] is not None}
    wanted = {folder.name: folder for folder in folders}
    for name in present - wanted.keys():
        _post(f"{url}/v1/unload_lora_adapter", {"lora_name": name})
    for name in wanted.keys() - present:
        _post(f"{url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(wanted[name])})


def _post(url: str, body: object) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_KEY}"}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).close()
