"""Images of requests: decoded as transformers decodes them, or refused by field, value and limit."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from motet.server.api import image_inputs
from motet.server.api.image_inputs import MOST_BYTES, MOST_IMAGES, MOST_PIXELS, PLACE, ImageInputs
from motet.server.api.inputs import InputError, Prompt
from tests.support.vision import data_url, picture


def read(*urls: str) -> list[Prompt]:
    inputs = ImageInputs(lambda image: torch.from_numpy(np.array(image)))
    return asyncio.run(inputs.read({f"input.{at}": url for at, url in enumerate(urls)}))


def pixels(url: str) -> torch.Tensor:
    (prompt,) = read(url)
    assert list(prompt.tokens) == [PLACE]
    assert list(prompt.given) == [PLACE]
    values: torch.Tensor = prompt.given[PLACE].values
    return values


def url_of(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS: dict[str, Any] = {
    "png": lambda: data_url(picture(1)),
    "jpeg": lambda: data_url(picture(2), "jpeg", quality=80),
    "progressive jpeg": lambda: data_url(picture(2), "jpeg", progressive=True),
    "grey": lambda: data_url(picture(3).convert("L")),
    "bits": lambda: data_url(picture(3).convert("1")),
    "grey and alpha": lambda: data_url(picture(3).convert("LA")),
    "alpha": lambda: data_url(picture(4).convert("RGBA")),
    "palette": lambda: data_url(picture(5).convert("P")),
    "transparent palette": lambda: data_url(picture(5).convert("P"), transparency=bytes(range(200, 256))),
    "cmyk": lambda: data_url(picture(6).convert("CMYK"), "jpeg"),
    "turned by its camera": lambda: data_url(picture(7), "jpeg", exif=turned()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_as_transformers_does(kind: str) -> None:
    url = KINDS[kind]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")  # ours must not
        expected = np.array(load_image(url))
    assert expected.shape[2] == 3
    assert np.array_equal(pixels(url).numpy(), expected)


def test_one_pixel_and_the_largest_image() -> None:
    assert pixels(data_url(Image.new("RGB", (1, 1)))).shape == (1, 1, 3)
    assert pixels(data_url(Image.new("L", (4096, 4096)))).shape == (4096, 4096, 3)


def test_equal_files_have_equal_keys() -> None:
    one, again, other = (prompt.given[PLACE].key for prompt in read(*(data_url(picture(at)) for at in (1, 1, 2))))
    assert one == again != other


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has next to nothing of it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"IDAT" + zlib.compress(b"\0" * 64)
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (body, content)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animation() -> bytes:
    file = io.BytesIO()
    picture(1).save(file, "PNG", save_all=True, append_images=[picture(2)])
    return file.getvalue()


def deep() -> Image.Image:
    return Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))


PNG = data_url(picture(1))
WRONG: dict[str, tuple[str, str]] = {
    "an address": ("https://example.org/cat.png", r"'https://example\.org/cat\.png', no data URL; nothing is fetched"),
    "a long text": ("no image " * 40, r"'no image no image [^']{0,40}…', no data URL"),
    "a file": ("file:///etc/passwd", "no data URL"),
    "no comma": ("data:image/png;base64", "no data URL"),
    "another format": (PNG.replace("png", "gif"), "the formats are image/png and image/jpeg"),
    "a format in capitals": (PNG.replace("png", "PNG"), "the formats are"),
    "no base64": ("data:image/png,abc", "with base64 and no parameters"),
    "a parameter": (PNG.replace(";base64", ";x=1;base64"), "with base64 and no parameters"),
    "bad base64": (f"{PNG[:60]}*{PNG[60:]}", "no base64 after the comma"),
    "unpadded": ("data:image/png;base64,abc", "no base64 after the comma"),
    "not ASCII": ("data:image/png;base64,äbcd", "no base64 after the comma"),
    "nothing": ("data:image/png;base64,", "cannot be decoded as image/png"),
    "not what it says": (PNG.replace("png", "jpeg"), "cannot be decoded as image/jpeg"),
    "cut off": (url_of(base64.b64decode(PNG.partition(",")[2])[:200]), "cannot be decoded as image/png"),
    "too many bytes": (
        "data:image/png;base64," + "A" * (MOST_BYTES * 4 // 3 + 8),
        r"bytes; an image may have 10,485,760",
    ),
    "a bomb": (url_of(header_of(60_000, 60_000)), r"60000 × 60000 pixels; at most 16,777,216"),
    "one row too many": (url_of(header_of(4096, 4097)), r"4096 × 4097 pixels; at most 16,777,216"),
    "elongated": (data_url(Image.new("RGB", (3, 61))), r"3 × 61 pixels; a side may be 20 times the other"),
    "an animation": (url_of(animation()), "an animation; send one image"),
    "16 bits": (data_url(deep()), "send 8 bits a channel"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_refused(kind: str) -> None:
    url, says = WRONG[kind]
    with pytest.raises(InputError, match=says) as refusal:
        read(PNG, url)
    assert refusal.value.field == "input.1"
    assert str(refusal.value).startswith("input.1 ")
    assert len(str(refusal.value)) < 200


def test_a_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError):
        read(url_of(header_of(MOST_PIXELS, 1)))


def test_too_many() -> None:
    with pytest.raises(InputError, match=f"input has 257 images; at most {MOST_IMAGES}") as refusal:
        read(*[PNG] * 257)
    assert refusal.value.field == "input"


def test_too_many_bytes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(base64.b64decode(PNG.partition(",")[2]))
    monkeypatch.setattr(image_inputs, "MOST_TOTAL_BYTES", 2 * size)
    assert len(read(PNG, PNG)) == 2
    with pytest.raises(InputError, match=r"the images up to this one have [\d,]+ bytes; a request may have") as refusal:
        read(PNG, PNG, PNG)
    assert refusal.value.field == "input.2"
