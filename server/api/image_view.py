"""The augmented view of an image that a merge's members are scored on: its colours changed, the image moved.

Must not know: files, requests, merges.

Each of four changes is made with probability 0.9, in this order, on pixels as the model takes them:

    brightness   x + b                  b uniform in [-1/2, 1/2]
    saturation   m + s (x - m)          m: mean over colours at each pixel, s uniform in [0, 2]
    contrast     m + c (x - m)          m: mean over the whole image, c uniform in [1/2, 3/2]
    translation  by up to an eighth of each side in whole pixels, zeros where nothing is left

Shapes: 3 colours, H × W pixels.

Source: the colour and translation of https://arxiv.org/abs/2006.10738, with AMT's probability.
"""

from __future__ import annotations

import random

import torch

PROBABILITY = 0.9
FARTHEST = 1 / 8
"""Share of each side."""


def changed_view(pixels_CHW: torch.Tensor, seed: str) -> torch.Tensor:
    """[3, H, W] float32: a function of its arguments alone."""
    chance = random.Random(seed)
    x_CHW = pixels_CHW
    if chance.random() < PROBABILITY:
        x_CHW = x_CHW + (chance.random() - 0.5)
    if chance.random() < PROBABILITY:
        x_CHW = _away_from(x_CHW.mean(0, keepdim=True), x_CHW, 2 * chance.random())
    if chance.random() < PROBABILITY:
        x_CHW = _away_from(x_CHW.mean(), x_CHW, 0.5 + chance.random())
    if chance.random() < PROBABILITY:
        down, right = (chance.randint(-most, most) for most in (round(side * FARTHEST) for side in x_CHW.shape[1:]))
        x_CHW = moved(x_CHW, down, right)
    return x_CHW


def _away_from(mean: torch.Tensor, x_CHW: torch.Tensor, factor: float) -> torch.Tensor:
    return mean + factor * (x_CHW - mean)


def moved(x_CHW: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """The image by whole pixels lower and further right, either may be negative; zeros move in."""
    height, width = x_CHW.shape[1:]
    result_CHW = torch.zeros_like(x_CHW)
    rows, columns = (slice(max(0, by), min(side, side + by)) for by, side in ((down, height), (right, width)))
    from_rows, from_columns = (
        slice(max(0, -by), min(side, side - by)) for by, side in ((down, height), (right, width))
    )
    result_CHW[:, rows, columns] = x_CHW[:, from_rows, from_columns]
    return result_CHW
