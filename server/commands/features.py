"""What an adapter's output head reads of labelled rows, from a service in this process.

Must not know: heads, the command line's options. Prompts become tokens by the endpoints' own code, and features come
from the engine as for any request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from motet.adapters.spec import Declared
from motet.server import serve as serving
from motet.server.api import uses
from motet.server.api.chat import prompt_of
from motet.server.api.completions import prompts_of
from motet.server.api.errors import ApiError
from motet.server.api.keys import ANYONE
from motet.server.api.schemas import ChatBody, CompletionBody
from motet.server.api.scoring import Question, Scorer, ScoringError
from motet.server.api.service import Service
from motet.server.api.voice import Voice
from motet.server.commands.labelled import LabelledRow
from motet.server.config import ServeConfig

Report = Callable[[str], None]
WAVE = 64
"""Prompts that the engine has at a time."""


def features_of(
    config: ServeConfig, folder: Path, declared: Declared, rows: Sequence[LabelledRow], width: int, report: Report
) -> torch.Tensor:
    """[N, D] float32 on the CPU, of the adapter in the folder.

    Args:
        width: D that the head was trained for.

    Raises:
        OptionError, ModelError, AdapterError: the base or the adapter cannot be served.
        click.ClickException: a row is not possible, or the head is of another base.
    """
    assembled = serving.assemble(config, report)

    async def computed() -> torch.Tensor:
        async with serving.opened(config, assembled, golden=False) as service:
            service.ready = True
            name = "adapter" if service.base.name != "adapter" else "calibrated"
            await asyncio.to_thread(service.registry.load, name, folder, declared)
            async with service.voice(CompletionBody(model=name, prompt=""), ANYONE) as voice:
                return await _computed(service, voice, name, rows, width, report)

    try:
        return asyncio.run(computed())
    except (ScoringError, ApiError) as error:
        raise click.ClickException(getattr(error, "message", str(error))) from error


async def _computed(
    service: Service, voice: Voice, name: str, rows: Sequence[LabelledRow], width: int, report: Report
) -> torch.Tensor:
    scorer = Scorer(service.base, service.engine, service.streams)
    prompts = [_prompt(voice, name, row, scorer.most_tokens) for row in rows]
    report(f"computing the features of {len(rows):,} rows, {sum(map(len, prompts)):,} tokens")
    waves: list[torch.Tensor] = []
    for start in range(0, len(prompts), WAVE):
        questions = [
            Question(prompt, lambda: uses.renewed(service.registry, voice.applied), voice.vocabulary)
            for prompt in prompts[start : start + WAVE]
        ]
        waves.append((await scorer.features(questions)).cpu())
        if (found := waves[-1].shape[1]) != width:
            raise click.ClickException(
                f"the head takes features of width {width}; those of base model {service.base.name!r} have {found}: "
                "name the base it was trained on with --model"
            )
    return torch.cat(waves)


def _prompt(voice: Voice, name: str, row: LabelledRow, most_tokens: int) -> Sequence[int]:
    """Token ids as the endpoint makes them: /v1/completions of a text, /v1/chat/completions of messages."""
    try:
        if isinstance(row.prompt, str):
            prompt = prompts_of(voice, CompletionBody(model=name, prompt=row.prompt))[0]
        else:
            prompt = prompt_of(voice, ChatBody(model=name, messages=row.prompt))
    except ApiError as error:
        raise click.ClickException(f"line {row.line}: {error.message}") from error
    if len(prompt) > most_tokens:
        raise click.ClickException(
            f"line {row.line} has {len(prompt)} tokens; the base model takes {most_tokens}: shorten it or leave it out"
        )
    return prompt
