"""Inputs of classify and merges as a request spells them: texts, or images, by what the base takes.

Must not know: how either is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from motet.server.api.base_info import Modality
from motet.server.api.inputs import InputError
from motet.server.api.schemas import ExampleBody, ImageBody

IMAGE = "data:image/"
"""What a data URL of an image begins with."""


def inputs_of(given: str | ImageBody | Sequence[str | ImageBody], takes: Modality) -> dict[str, str]:
    """Field → text, or data URL of an image.

    Raises:
        InputError: one is not what the base takes.
    """
    several = [given] if isinstance(given, str | ImageBody) else given
    return {f"input.{place}": _one(f"input.{place}", one, takes) for place, one in enumerate(several)}


def example_of(place: int, example: ExampleBody, takes: Modality) -> tuple[str, str]:
    """Text or data URL, and label.

    Raises:
        InputError: the example has both or neither, or is not what the base takes.
    """
    field = f"support.{place}"
    if (example.text is None) == (example.image is None):
        raise InputError(field, f"{field} needs one of text and image; the base model takes {takes}s")
    if example.text is not None:
        return _one(f"{field}.text", example.text, takes, is_text=True), example.label
    assert example.image is not None
    return _one(f"{field}.image", ImageBody(image=example.image), takes), example.label


def _one(field: str, given: str | ImageBody, takes: Modality, is_text: bool = False) -> str:
    """A plain string is whatever the base takes, unless it is known for a text or cannot be one."""
    value = given if isinstance(given, str) else given.image
    is_image = not isinstance(given, str) or value.startswith(IMAGE)
    if takes == "text" and is_image:
        raise InputError(field, f"{field} is an image; the base model takes texts: serve a vision transformer for it")
    if takes == "image" and is_text:
        raise InputError(field, f"{field} is a text; the base model takes images: send image, a data URL")
    return value
