"""A native step gives what the modules give, for the rows it takes, and takes what it should."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from motet.kernels.cpu.compiled import Processor, processors
from motet.server.model import loader
from motet.server.model.division import Division
from motet.server.model.native import NativeDecoder
from tests.support.harness import GREEDY, Harness, Using
from tests.support.models import ALL_LINEARS, save_peft, tiny_gemma3, tiny_llama, tiny_qwen2
from tests.support.native import native_engine
from tests.support.tolerances import TOLERANCES

LORA = {"target_modules": ALL_LINEARS}
PROMPTS = [[5, 9, 33, 7, 120], [8], [200, 3, 3, 90, 14, 60, 61, 62, 63, 64, 65, 66, 67], [17, 18], [99, 98, 97]]
USING: list[Using] = [None, "plain", "dora", "biased", (("plain", None), ("other", (0.25,)))]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of a tiny Llama, one for each thing a native step does."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_llama()
    configs = {
        "plain": LoraConfig(r=5, **LORA),
        "other": LoraConfig(r=16, target_modules=["q_proj", "down_proj"]),
        "dora": LoraConfig(r=3, use_dora=True, **LORA),
        "biased": LoraConfig(r=4, lora_bias=True, **LORA),
        "norms": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
        "head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: a bias where the base has none cannot be merged
        return {name: save_peft(model, root / name, one, seed) for seed, (name, one) in enumerate(configs.items())}


def _harness(adapters: dict[str, Path], model: Any = None, **options: Any) -> Harness:
    harness = Harness(tiny_llama() if model is None else model, **options)
    for name, folder in adapters.items():
        harness.load(name, folder)
    return harness


def _logits(harness: Harness) -> torch.Tensor:
    """[requests, drawn tokens, V], several steps of one mixed batch."""
    made = harness.run(list(zip(PROMPTS, USING, strict=True)), dataclasses.replace(GREEDY, max_tokens=3))
    return torch.stack([torch.stack(one.logits) for one in made])


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path]) -> torch.Tensor:
    """What the modules in torch give, in float32."""
    harness = _harness(adapters, native=False)
    logits = _logits(harness)
    assert set(harness.runner.rows) == {"base"}
    return logits


@pytest.mark.parametrize("processor", list(Processor))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_modules_own(
    processor: Processor, dtype: torch.dtype, adapters: dict[str, Path], expected: torch.Tensor
) -> None:
    if processor not in processors():
        pytest.skip(f"this machine does not run {processor.name}")
    harness = _harness(adapters, tiny_llama().to(dtype), processor=processor)
    _logits(harness)
    native_engine(processor).poison()
    actual = _logits(harness)
    assert set(harness.runner.rows) == {"native"}
    if dtype == torch.float32:
        TOLERANCES["logits", dtype].assert_close(actual, expected)
    else:
        first = actual[:, 0], expected[:, 0]  # later tokens may be others
        TOLERANCES["logits of a tiny model", dtype].assert_close(*first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_kept_once(dtype: torch.dtype, tied: bool) -> None:
    """In the products' own order, but for those that the embedding shares; whoever lowers an adapter sees them all."""
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    original = {path: parameter.float().clone() for path, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = Harness(model).loaded
    for path, values in original.items():
        assert torch.equal(loaded.base.parameter(path), values), path
    bytes_kept = {
        path: p.untyped_storage().nbytes() for path, p in loaded.model.named_parameters(remove_duplicate=False)
    }
    for path in loaded.base.targets:
        shared = (tied and path in (loaded.head_path, loaded.embedding_path)) or path == loaded.embedding_path
        assert (bytes_kept[f"{path}.weight"] > dtype.itemsize) is shared, path


def test_biases_of_the_base(adapters: dict[str, Path]) -> None:
    requests = [(prompt, None) for prompt in PROMPTS]
    native, modules = Harness(tiny_qwen2()), Harness(tiny_qwen2(), native=False)
    TOLERANCES["logits", torch.float32].assert_close(native.logits(requests), modules.logits(requests))
    assert set(native.runner.rows) == {"native"}


def test_a_row_does_not_depend_on_its_neighbours(adapters: dict[str, Path]) -> None:
    """Not by a bit, whoever they are (I6)."""
    harness = _harness(adapters, tiny_llama().bfloat16())
    together = harness.logits(list(zip(PROMPTS, USING, strict=True)))
    for i, request in enumerate(zip(PROMPTS, USING, strict=True)):
        assert torch.equal(harness.logits([request])[0], together[i])


def test_what_it_does_not_know_runs_beside_it(adapters: dict[str, Path], expected: torch.Tensor) -> None:
    """A neighbour with replaced norms: its rows alone go through the modules, and both are counted."""
    harness, modules = _harness(adapters), _harness(adapters, native=False)
    requests: list[tuple[list[int], Using]] = [(PROMPTS[0], "norms"), *zip(PROMPTS, USING, strict=True)]
    logits = harness.logits(requests)
    TOLERANCES["logits", torch.float32].assert_close(logits[1:], expected[:, 0])
    TOLERANCES["logits", torch.float32].assert_close(logits[:1], modules.logits(requests[:1]))
    assert harness.runner.rows == {"native": sum(map(len, PROMPTS)), "overlay": len(PROMPTS[0])}


def test_an_adapted_head_and_features_leave_the_layers_native(adapters: dict[str, Path]) -> None:
    harness, modules = _harness(adapters), _harness(adapters, native=False)
    requests: list[tuple[list[int], Using]] = [(PROMPTS[2], "head"), (PROMPTS[0], "plain"), (PROMPTS[4], None)]
    samplings = [dataclasses.replace(GREEDY, max_tokens=2, feature=i != 1) for i in range(3)]
    made, expected = (one.run(requests, samplings=samplings) for one in (harness, modules))
    for ours, theirs in zip(made, expected, strict=True):
        TOLERANCES["logits", torch.float32].assert_close(torch.stack(ours.logits), torch.stack(theirs.logits))
        assert (ours.events[0].feature is None) == (theirs.events[0].feature is None)
        if theirs.events[0].feature is not None:
            TOLERANCES["logits", torch.float32].assert_close(ours.events[0].feature, theirs.events[0].feature)
    assert set(harness.runner.rows) == {"native"}


def test_what_is_stale_in_a_block_is_cleared(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules multiply what lies beyond a sequence's end by zero: a native step must not leave NaN there."""
    harness = _harness(adapters)
    assert harness.loaded.attention.cache is not None
    for cache in (harness.loaded.attention.cache.keys, harness.loaded.attention.cache.values):
        for blocks in cache.values():
            blocks[:-1] = torch.nan
    paths = iter([None, "overlay", "overlay"])
    monkeypatch.setattr(Division, "modules_only", lambda *_: next(paths))
    (made,) = harness.run([(PROMPTS[0], None)], dataclasses.replace(GREEDY, max_tokens=3))
    assert torch.stack(made.logits).isfinite().all()
    assert harness.runner.rows == {"native": len(PROMPTS[0]), "overlay": 2}


@pytest.mark.parametrize(
    "model",
    [tiny_gemma3, lambda: tiny_llama(hidden_act="gelu"), lambda: tiny_llama(rope_parameters=DYNAMIC)],
    ids=["another family", "another activation", "a rotation that depends on the length"],
)
def test_bases_of_another_shape_run_through_their_modules(model: Any) -> None:
    harness, modules = Harness(model()), Harness(model(), native=False)
    assert harness.loaded.native is None
    requests = [(prompt, None) for prompt in PROMPTS]
    TOLERANCES["logits", torch.float32].assert_close(harness.logits(requests), modules.logits(requests))
    assert set(harness.runner.rows) == {"base"}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}


def test_a_native_step_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(NativeDecoder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._model.score_scale *= 3

    monkeypatch.setattr("motet.server.model.native.NativeDecoder", Wrong)
    with caplog.at_level(logging.WARNING, logger=loader.__name__):
        assert Harness(tiny_llama()).loaded.native is None
    assert "served through torch" in caplog.text
    assert "standard deviations" in caplog.text
