"""Images as a request gives them, data URLs, as the engine takes them: the only input of a prompt of one position.

Must not know: HTTP, adapters, the model's preprocessing. Nothing is fetched. The header of a file says how large the
image is before any of it is decoded.

Shapes: 3 colours, H × W pixels as the model takes them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from motet.server.api.base_info import Modality
from motet.server.api.image_view import changed_view
from motet.server.api.inputs import InputError, Prompt
from motet.server.engine.types import GivenInput

MOST_IMAGES = 256
"""Of one request; at 224 × 224 they are 154 MB as the model takes them, and a merge holds a second view of each."""
MOST_BYTES = 10 << 20
"""Of one image, as a file."""
MOST_TOTAL_BYTES = 64 << 20
"""Of one request's images, as files."""
MOST_PIXELS = 1 << 24
"""Of one image; decoded it takes 50 MB."""
MOST_ELONGATED = 20
"""Longer side through shorter one: preprocessing may scale the shorter side up to the model's."""
FORMATS = {"image/png": PngImageFile, "image/jpeg": JpegImageFile}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
"""8 bits a channel, or fewer: what becomes RGB without loss of range."""
PLACE = 0
"""The position of the image, and the token that stands for it there."""

Preprocess = Callable[[Image.Image], torch.Tensor]
"""RGB image → [3, H, W] float32, as the base takes it."""


class ImageInputs:
    """Reads images for one base.

    Note: decoding runs in a thread of its own; `preprocess` must allow several at a time.
    """

    modality: Modality = "image"

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess

    async def read(self, given: Mapping[str, str]) -> list[Prompt]:
        """Decode data URLs.

        Raises:
            InputError: one is no image of the accepted kinds and sizes, or they are too many.
        """
        if len(given) > MOST_IMAGES:
            field = next(iter(given)).partition(".")[0]
            raise InputError(field, f"{field} has {len(given)} images; at most {MOST_IMAGES} are possible in a request")
        return await asyncio.to_thread(self._read, given)

    def _read(self, given: Mapping[str, str]) -> list[Prompt]:
        prompts, total = [], 0
        for field, url in given.items():
            media_type, content = file_of(field, url)
            total += len(content)
            if total > MOST_TOTAL_BYTES:
                raise InputError(
                    field,
                    f"{field}: the images up to this one have {total:,} bytes; a request may have "
                    f"{MOST_TOTAL_BYTES:,}: ask in several",
                )
            pixels_CHW = self._preprocess(decoded(field, media_type, content))
            prompts.append(_prompt(hashlib.sha256(content).hexdigest(), pixels_CHW))
        return prompts

    async def augmented(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Each image with changed colours, and moved."""
        return await asyncio.to_thread(lambda: [_view(prompt.given[PLACE], seed) for prompt in prompts])


def file_of(field: str, url: str) -> tuple[str, bytes]:
    """Media type and content of a data URL.

    Raises:
        InputError: it is another URL, of another format, too large, or no base64.
    """
    head, comma, body = url.partition(",")
    if not (url.startswith("data:") and comma):
        raise InputError(
            field, f"{field} is {_shown(url)}, no data URL; nothing is fetched: send data:image/png;base64,…"
        )
    media_type, *parameters = head.removeprefix("data:").split(";")
    if media_type not in FORMATS or parameters != ["base64"]:
        raise InputError(
            field, f"{field} is {_shown(head)}; the formats are {' and '.join(FORMATS)}, with base64 and no parameters"
        )
    if len(body) > -(-MOST_BYTES // 3) * 4:
        raise InputError(
            field, f"{field} has {len(body) * 3 // 4:,} bytes; an image may have {MOST_BYTES:,}: make it smaller"
        )
    try:
        return media_type, base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:  # the latter: not ASCII
        raise InputError(field, f"{field} is no base64 after the comma; encode the file with padding") from error


def decoded(field: str, media_type: str, content: bytes) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says, as transformers itself loads one.

    Raises:
        InputError: it is damaged, of another format, too large, too elongated, or more than one image.
    """
    try:
        image: Image.Image = FORMATS[media_type](io.BytesIO(content))
        _require_possible(field, image)
        image.info.pop("transparency", None)  # the colours behind it are kept, as transformers keeps them
        return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # the readers of these formats raise whatever the damage happens to cause
        raise InputError(
            field, f"{field} cannot be decoded as {media_type}: it is damaged, or of another format"
        ) from error


def _require_possible(field: str, image: Image.Image) -> None:
    """By what the header says, before anything is decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(
            field, f"{field} has {width} × {height} pixels; at most {MOST_PIXELS:,} are possible: make it smaller"
        )
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise InputError(
            field, f"{field} has {width} × {height} pixels; a side may be {MOST_ELONGATED} times the other: crop it"
        )
    if getattr(image, "n_frames", 1) != 1:
        raise InputError(field, f"{field} is an animation; send one image")
    if image.mode not in MODES:
        raise InputError(field, f"{field} has pixels of kind {image.mode!r}; send 8 bits a channel")


def _view(image: GivenInput, seed: int) -> Prompt:
    return _prompt(f"{image.key} {seed}", changed_view(image.values, f"{seed} {image.key}"))


def _prompt(key: str, pixels_CHW: torch.Tensor) -> Prompt:
    return Prompt([PLACE], {PLACE: GivenInput(key, pixels_CHW)})


def _shown(text: str) -> str:
    """Short enough for a message."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
