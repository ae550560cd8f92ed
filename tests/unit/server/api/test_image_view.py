"""The augmented view: a function of the image and the seed, made of four changes whose sizes are known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from motet.server.api import image_view
from motet.server.api.image_inputs import PLACE, ImageInputs
from motet.server.api.image_view import changed_view, moved
from motet.server.api.inputs import Prompt
from tests.support.vision import data_url, picture, processor

IMAGE = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(2))


class Chance:
    """Draws what a test says: the first of each pair decides whether a change is made."""

    def __init__(self, numbers: list[float], whole: list[int]) -> None:
        self.numbers, self.whole = iter(numbers), iter(whole)
        self.bounds: list[tuple[int, int]] = []

    def random(self) -> float:
        return next(self.numbers)

    def randint(self, low: int, high: int) -> int:
        self.bounds.append((low, high))
        return next(self.whole)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def draw(numbers: list[float], *whole: int) -> tuple[torch.Tensor, Chance]:
        chance = Chance(numbers, list(whole))
        monkeypatch.setattr(image_view.random, "Random", lambda _: chance)
        found = changed_view(IMAGE, "")
        assert list(chance.numbers) == list(chance.whole) == []
        return found, chance

    return draw  # type: ignore[return-value]


NO, YES = 0.91, 0.89


def test_each_change_alone(drawing) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(drawing([NO, NO, NO, NO])[0], IMAGE)
    torch.testing.assert_close(drawing([YES, 0.7, NO, NO, NO])[0], IMAGE + 0.2)
    grey = torch.stack([(IMAGE[0] + IMAGE[1] + IMAGE[2]) / 3] * 3)
    torch.testing.assert_close(drawing([NO, YES, 0.0, NO, NO])[0], grey)
    torch.testing.assert_close(drawing([NO, YES, 0.75, NO, NO])[0], 1.5 * IMAGE - 0.5 * grey)
    mean = IMAGE.sum() / IMAGE.numel()
    torch.testing.assert_close(drawing([NO, NO, YES, 0.25, NO])[0], 0.75 * IMAGE + 0.25 * mean)
    lower, chance = drawing([NO, NO, NO, YES], 2, -3)
    assert chance.bounds == [(-2, 2), (-3, 3)]
    assert torch.equal(lower[:, 2:, :-3], IMAGE[:, :-2, 3:])
    assert not lower[:, :2].any()
    assert not lower[:, :, -3:].any()


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-1, 0), (0, 5), (-2, -3), (2, 3)])
def test_moved_by_whole_pixels(down: int, right: int) -> None:
    found = moved(IMAGE, down, right)
    for row in range(16):
        for column in range(24):
            inside = 0 <= row - down < 16 and 0 <= column - right < 24
            expected = IMAGE[:, row - down, column - right] if inside else torch.zeros(3)
            assert torch.equal(found[:, row, column], expected)


def test_a_function_of_seed_and_image_alone() -> None:
    before = IMAGE.clone()
    assert torch.equal(changed_view(IMAGE, "1 a"), changed_view(IMAGE, "1 a"))
    assert not torch.equal(changed_view(IMAGE, "1 a"), changed_view(IMAGE, "2 a"))
    assert torch.equal(IMAGE, before)


def test_views_of_a_support() -> None:
    """Equal images have equal views wherever they stand; a view has a key of its own."""
    inputs = ImageInputs(lambda image: processor()(images=image, return_tensors="pt")["pixel_values"][0])
    given = {str(at): data_url(picture(seed)) for at, seed in enumerate((1, 2, 1))}

    async def views(seed: int) -> tuple[list[Prompt], list[Prompt]]:
        prompts = await inputs.read(given)
        return prompts, await inputs.augmented(prompts, seed)

    prompts, first = asyncio.run(views(5))
    _, again = asyncio.run(views(5))
    _, other = asyncio.run(views(6))
    values = [[prompt.given[PLACE].values for prompt in of] for of in (prompts, first, again, other)]
    assert all(torch.equal(one, two) for one, two in zip(values[1], values[2], strict=True))
    assert torch.equal(values[1][0], values[1][2])
    assert not torch.equal(values[1][0], values[1][1])
    assert not torch.equal(values[1][0], values[3][0])
    assert not torch.equal(values[1][0], values[0][0])
    keys = {prompt.given[PLACE].key for of in (prompts, first, other) for prompt in of}
    assert len(keys) == 6
