"""A server of a tiny vision transformer with adapters of several origins, and what each of them computes alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.e2e.process import ADMIN_KEY, Server, eventually
from tests.support import amt_vit, emtal_vit
from tests.support.vision import (
    LORAS,
    SAVED,
    Oracle,
    answers,
    data_url,
    peft_answers,
    picture,
    processor,
    save_loras,
    write_emtal,
    write_pool,
)

LABELS = ("anemone", "briar rose", "clover", "daisy", "elder", "fern", "gorse")
LOADED = ("narrow", "tenant/head", "norms", "emtal", "pool")
MEMORY = "motet_adapter_memory_bytes"


@dataclass
class Vision:
    """The server of a session, "vit"; all folders lie below its adapter root.

    Attributes:
        oracles: model → what it computes of preprocessed images.
        pool: what the pool was converted from.
    """

    server: Server
    root: Path
    model: Any
    folders: Mapping[str, Path]
    oracles: Mapping[str, Oracle]
    pool: amt_vit.Official

    def classify(self, model: str, given: Any) -> dict[str, Any]:
        """The body of an answer that must succeed."""
        response = self.server.post("/v1/classify", {"model": model, "input": given})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


def preprocessed(images: Sequence[Image.Image]) -> torch.Tensor:
    """[N, 3, H, W], by transformers' own processor."""
    pixels_NCHW: torch.Tensor = processor()(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels_NCHW


def images(count: int, first: int = 100) -> list[Image.Image]:
    """Of several sizes."""
    return [picture(first + at, 16 + 5 * (at % 4), 31 - 3 * (at % 5)) for at in range(count)]


def urls(of: Sequence[Image.Image]) -> list[str]:
    """As PNG, from which what is decoded is what was drawn."""
    return [data_url(one) for one in of]


def serving(root: Path) -> Iterator[Vision]:
    """The server; at the end no adapter may be leased: each is gone from memory once its name is."""
    base = emtal_vit.tiny_vit(id2label=dict(enumerate(LABELS)), label2id={one: at for at, one in enumerate(LABELS)})
    model = copy.deepcopy(base)
    folders = save_loras(base, root, LORAS | SAVED)
    folders["tenant/head"] = folders.pop("head")
    folders["pool"], pool = write_pool(base, root)
    folders["emtal"], _ = write_emtal(base, root)
    base.save_pretrained(root / "base")
    processor().save_pretrained(root / "base")
    arguments = ["--model", str(root / "base"), "--name", "vit", "--dtype", "float32", "--adapter-root", str(root)]
    arguments += [part for name in LOADED for part in ("--adapter", f"{name}={folders[name]}")]
    oracles: dict[str, Oracle] = {"vit": lambda pixels_NCHW: answers(model, pixels_NCHW)}
    for name in LOADED[:4]:
        oracles[name] = lambda pixels_NCHW, name=name: peft_answers(model, folders[name], pixels_NCHW)  # type: ignore[misc]
    server = Server(arguments, root / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
    try:
        yield Vision(server.wait_until_ready(), root, model, folders, oracles, pool)
        server.wait_until_idle()
        for name in LOADED:
            assert server.unload(name).status_code == 200
        eventually(lambda: server.metrics[MEMORY] == 0)
    finally:
        code = server.stop()
    log = server.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log, log
