"""Log-probabilities as they are served, beside those of the dense float32 merge.

Must not know: the command line's options, how results are shown.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from transformers import AutoTokenizer

from motet.adapters import golden
from motet.adapters.effects import Lowered
from motet.adapters.errors import ExportError
from motet.adapters.gates.fixed import explicit, fixed
from motet.adapters.spec import Declared
from motet.server import serve as serving
from motet.server.api.scoring import Scorer, ScoringError
from motet.server.commands.client import base_of, call, lowered_of
from motet.server.commands.prompts import tokens_of
from motet.server.commands.reference import DenseReference, base_fingerprint
from motet.server.config import OptionError, ServeConfig
from motet.server.model.loader import LoadedModel

Report = Callable[[str], None]
Logprobs = list[list[float]]
"""Per prompt, of its tokens from the second on."""
Gate = tuple[float, ...] | None
"""Explicit weights for the adapter's gate."""


@dataclass(frozen=True, slots=True)
class PromptComparison:
    """One prompt.

    Attributes:
        adapter, base: max |Δlogprob| over its positions, of the adapter and of the base without one, in nats.
        dense: the merge's log-probabilities.
    """

    tokens: tuple[int, ...]
    adapter: float
    base: float
    dense: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All prompts.

    Attributes:
        version: name@digest.
        dtype: what was served in.
        gate: the weights that were given for the adapter's gate; None where it has none.
    """

    version: str
    base_name: str
    fingerprint: str
    dtype: str
    prompts: tuple[PromptComparison, ...]
    gate: Gate = None

    @property
    def adapter(self) -> float:
        """The largest difference of the adapter, in nats."""
        return max(prompt.adapter for prompt in self.prompts)

    @property
    def base(self) -> float:
        """The largest difference of the base without an adapter, in nats."""
        return max(prompt.base for prompt in self.prompts)


def of_folder(
    config: ServeConfig,
    folder: Path,
    declared: Declared,
    gate: Gate,
    texts: Sequence[str],
    file: Path | None,
    report: Report,
) -> Comparison:
    """Serve the folder in this process, without HTTP and golden checks, and compare.

    Raises:
        OptionError, ModelError, AdapterError: the base or the adapter cannot be served.
    """
    with tempfile.TemporaryDirectory() as cache:  # so that it is lowered once, and read back as a server would
        return _of_folder(replace(config, adapter_cache=cache), folder, declared, gate, texts, file, report)


def _of_folder(
    config: ServeConfig,
    folder: Path,
    declared: Declared,
    gate: Gate,
    texts: Sequence[str],
    file: Path | None,
    report: Report,
) -> Comparison:
    assembled = serving.assemble(config, report)
    loaded = assembled.loaded
    if not isinstance(loaded, LoadedModel):
        raise OptionError(f"{loaded.name!r} takes images: there are no log-probabilities of tokens to compare")
    prompts = tokens_of(lambda text: loaded.tokenizer(text)["input_ids"], texts, file)

    async def served() -> tuple[str, Lowered, Logprobs, Logprobs]:
        async with serving.opened(config, assembled, golden=False) as service:
            report("serving the adapter")
            registry, scorer = service.registry, Scorer(service.base, service.engine, service.streams)
            name = "adapter" if service.base.name != "adapter" else "verified"
            info = await asyncio.to_thread(registry.load, name, folder, declared)
            _, lowered = await asyncio.to_thread(registry.lowered, name)
            factors = explicit(lowered.gate, gate)
            adapter = await scorer.logprobs(prompts, lambda: registry.acquire(name), gate=factors)
            version = f"{folder.resolve().name}@{info.version.digest}"
            return version, fixed(lowered, factors), adapter, await scorer.logprobs(prompts, lambda: None)

    try:
        version, lowered, adapter, base = asyncio.run(served())
    except ScoringError as error:
        raise click.ClickException(str(error)) from error
    report("computing the dense merge")
    reference = DenseReference(serving.base_path(config.model))
    dtype = str(loaded.dtype).removeprefix("torch.")
    compared = _compare(reference, lowered, prompts, adapter, base)
    return Comparison(version, loaded.name, loaded.base.fingerprint, dtype, compared, gate)


def of_name(
    url: str, name: str, model: str | None, gate: Gate, texts: Sequence[str], file: Path | None, report: Report
) -> Comparison:
    """Ask a running server for what it serves as `name`, and compare.

    Args:
        model: directory or hub id of the server's base model; None is the default model.
    """
    version, lowered = lowered_of(url, name)
    lowered = fixed(lowered, explicit(lowered.gate, gate))
    server_base = base_of(url)
    path = serving.base_path(model)
    report("comparing the base models")
    if (own := base_fingerprint(path, server_base["dtype"])) != server_base["fingerprint"]:
        raise click.ClickException(
            f"the server's base model {server_base['name']!r} has fingerprint {server_base['fingerprint'][:12]}, "
            f"the one here {own[:12]}; name the server's with --model"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    prompts = tokens_of(lambda text: tokenizer(text)["input_ids"], texts, file)
    report("asking the server")
    adapter, base = _served(url, name, prompts, version, gate), _served(url, server_base["name"], prompts, None)
    report("computing the dense merge")
    compared = _compare(DenseReference(path), lowered, prompts, adapter, base)
    return Comparison(version, server_base["name"], server_base["fingerprint"], server_base["dtype"], compared, gate)


def _served(url: str, name: str, prompts: list[list[int]], version: str | None, gate: Gate = None) -> Logprobs:
    body = {"model": name, "prompt": prompts, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 0}
    body |= {} if gate is None else {"gate": {"weights": gate}}
    response = call("POST", url, "/v1/completions", "MOTET_API_KEY", body)
    if response.headers.get("X-Motet-Adapter") != version:
        raise click.ClickException(f"{name!r} moved to another version while it was verified; try again")
    choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["logprobs"]["token_logprobs"][1:] for choice in choices]


def _compare(
    reference: DenseReference, lowered: Lowered, prompts: list[list[int]], adapter: Logprobs, base: Logprobs
) -> tuple[PromptComparison, ...]:
    dense_base = [reference.logprobs(tokens) for tokens in prompts]
    reference.merge(lowered)
    dense = [reference.logprobs(tokens) for tokens in prompts]
    return tuple(
        PromptComparison(
            tuple(tokens), _largest(adapter[i], dense[i]), _largest(base[i], dense_base[i]), tuple(dense[i])
        )
        for i, tokens in enumerate(prompts)
    )


def _largest(served: Sequence[float], dense: Sequence[float]) -> float:
    differences = [abs(one - other) for one, other in zip(served, dense, strict=True)]
    return math.inf if any(math.isnan(difference) for difference in differences) else max(differences)


def write_golden(compared: Comparison, file: Path, tolerance: float) -> None:
    """Write the merge's log-probabilities as a golden.json, whole or not at all.

    Raises:
        ConfigError: a load would refuse the file: too many prompts or tokens, or the tolerance.
        ExportError: it cannot be written.
    """
    prompts = tuple(golden.GoldenPrompt(prompt.tokens, prompt.dense) for prompt in compared.prompts)
    content = golden.dump(golden.Golden(tolerance, prompts, compared.gate)).encode()
    golden.parse(content)
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, file)
    except OSError as error:
        raise ExportError(f"{file.name!r} cannot be written: {error.strerror}; choose another place") from error
    finally:
        unfinished.unlink(missing_ok=True)
