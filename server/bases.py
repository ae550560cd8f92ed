"""What runs the steps of a base, and what the endpoints know of it: of a language model, or of a vision transformer.

Must not know: adapters, HTTP, who asks for a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from motet.adapters.residency import Residency
from motet.kernels.dispatch import default_backend
from motet.server.api.base_info import BaseInfo
from motet.server.api.image_inputs import PLACE, ImageInputs
from motet.server.api.inputs import Inputs, TextInputs
from motet.server.config import OptionError, ServeConfig
from motet.server.engine.scheduler import StepLimits
from motet.server.engine.types import BlockId, GenerationId, GivenInput, Plan, Runner, Sampling, Span
from motet.server.model.attention import KvCache
from motet.server.model.batch import EffectsBuilder
from motet.server.model.loader import LoadedModel
from motet.server.model.runner import ModelRunner
from motet.server.model.vision import LoadedVision
from motet.server.model.vision_runner import VisionRunner

Loaded = LoadedModel | LoadedVision

DEFAULT_ROWS = {"cpu": 512, "cuda": 4096}
DEFAULT_GENERATIONS = {"cpu": 64, "cuda": 256}
DEFAULT_IMAGES = {"cpu": 8, "cuda": 64}
"""Of one step, where --max-batch-rows does not say how many of their tokens it may have."""
IMAGE_POSITIONS = 2
"""The image, and the token that it ends with."""


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """How a base's steps run.

    Attributes:
        tokenizer: None for a base without text.
        blocks, block_size: of the key-value cache; of images, what the scheduler counts them by.
        warm_up: plans that the first request does not have to pay for.
        summary: what of the memory people want to know: name and value.
        paths: how many rows were computed natively, and how many not, by what kept them from it.
    """

    runner: Runner
    tokenizer: Any
    inputs: Inputs
    info: BaseInfo
    blocks: int
    block_size: int
    limits: StepLimits
    warm_up: Sequence[Plan]
    summary: tuple[str, str]
    paths: Callable[[], Mapping[str, int]] = dict


def text_steps(config: ServeConfig, loaded: LoadedModel, residency: Residency, kv_bytes: int) -> Steps:
    """Of a language model; allocates its key-value cache."""
    kind = loaded.device.type
    blocks = kv_bytes // KvCache.block_bytes(loaded.layers, config.block_size, loaded.dtype)
    loaded.allocate_cache(blocks, config.block_size)
    paths = {"embedding": loaded.embedding_path, "head": loaded.head_path}
    effects = _effects(loaded, residency, **paths, engine=loaded.engine)
    info = _info(
        loaded,
        max_length=min(loaded.max_length, blocks * config.block_size),
        vocabulary=loaded.vocabulary,
        end_tokens=loaded.end_tokens,
        weights=config.base_weights,
    )
    rows = config.max_batch_rows or DEFAULT_ROWS[kind]
    runner = ModelRunner(loaded, effects)
    return Steps(
        runner=runner,
        tokenizer=loaded.tokenizer,
        inputs=TextInputs(loaded.tokenizer),
        info=info,
        blocks=blocks,
        block_size=config.block_size,
        limits=StepLimits(rows, config.max_generations or DEFAULT_GENERATIONS[kind]),
        warm_up=[_plan((1,) * 16, 0), _plan((1,), 15)],
        summary=("KV blocks", f"{blocks:,} of {config.block_size} positions"),
        paths=lambda: dict(runner.rows),
    )


def vision_steps(config: ServeConfig, loaded: LoadedVision, residency: Residency) -> Steps:
    """Of a vision transformer: an image is a prompt of one position, and runs for one step.

    Raises:
        OptionError: an option says something of keys and values, which are not kept here.
    """
    for option in ("kv_memory", "block_size"):
        if getattr(config, option) != getattr(ServeConfig(), option):
            raise OptionError(
                f"--{option.replace('_', '-')} {getattr(config, option)}: {loaded.name!r} takes images and keeps no "
                "keys and values; leave it out"
            )
    images = DEFAULT_IMAGES[loaded.device.type]
    if config.max_batch_rows is not None and not (images := config.max_batch_rows // loaded.tokens):
        raise OptionError(
            f"--max-batch-rows {config.max_batch_rows}: one image is {loaded.tokens} rows; allow at least as many"
        )
    images = min(images, config.max_generations or images)
    effects = _effects(loaded, residency, embedding=None, head=None, rows_of_position=loaded.tokens)
    blank = {PLACE: GivenInput("blank", torch.zeros(loaded.pixels))}
    return Steps(
        runner=VisionRunner(loaded, effects),
        tokenizer=None,
        inputs=ImageInputs(loaded.preprocess),
        info=_info(loaded, IMAGE_POSITIONS, 1, frozenset(), modality="image", labels=loaded.labels),
        blocks=2 * images,  # an admission leaves a block for every image that runs
        block_size=IMAGE_POSITIONS,
        limits=StepLimits(images, images),
        warm_up=[_plan((PLACE,), 0, blank)],
        summary=("images", f"{images} of {loaded.tokens} rows in one step"),
    )


def _effects(loaded: Loaded, residency: Residency, **options: Any) -> EffectsBuilder:
    return EffectsBuilder(residency, list(loaded.base.targets.values()), default_backend(loaded.device), **options)


def _info(loaded: Loaded, max_length: int, vocabulary: int, end_tokens: frozenset[int], **more: Any) -> BaseInfo:
    return BaseInfo(
        name=loaded.name,
        fingerprint=loaded.base.fingerprint,
        max_length=max_length,
        vocabulary=vocabulary,
        end_tokens=end_tokens,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        created_s=int(time.time()),
        **more,
    )


def _plan(tokens: tuple[int, ...], start: int, given: dict[int, GivenInput] | None = None) -> Plan:
    """One generation that draws a token."""
    sampling = Sampling(max_tokens=1)
    return Plan((Span(GenerationId(0), (), tokens, start, (BlockId(0),), True, sampling, 0, given=given or {}),))
