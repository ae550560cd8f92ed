"""What EMTAL's router costs, and that a faded one costs nothing: in the form that trains, and served.

The plain LoRA beside it is the same adapter, written out as PEFT has it, so every form but the routed one computes the
same. Run it from the repository root, alone on a core if it can be had; two lines are appended:

    OMP_NUM_THREADS=1 python -m tests.bench.emtal --out docs/results/emtal-cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from motet.adapters.export import export_peft
from motet.adapters.methods import lower
from motet.adapters.recipes.emtal import start
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.source import read
from tests.bench.lines import append, surroundings
from tests.support.bases import base_of
from tests.support.harness import GREEDY, Harness
from tests.support.tolerances import TOLERANCES

RANK = 4
SHAPES = ((1, 64), (8, 32))
"""(rows, tokens a row) of a forward."""
ROWS = (1, 8)
"""Of a served step."""
PROMPT_TOKENS, DECODED = 16, 12
WARM_UPS, ROUNDS = 1, 9
BASE, LORA, ROUTED, FADED = "base", "lora", "emtal, router active", "emtal, router faded"


def training_form(model_folder: Path, emtal_folder: Path, lora_folder: Path) -> Mapping[str, Any]:
    """Forwards in float32, and both folders for what follows."""
    base = _model(model_folder, torch.float32)
    torch.manual_seed(0)
    recipe = RECIPES["emtal"]
    trainee = start(Setup(_model(model_folder, torch.float32), recipe, RANK, RANK, recipe.targets, "base", list))
    _as_if_trained(trainee)
    trainee.save(emtal_folder)
    lowered = lower(read(emtal_folder), base_of(base))
    export_peft(lowered, lora_folder, [name for name, _ in base.named_modules()], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT on a newer transformers
        lora = PeftModel.from_pretrained(_model(model_folder, torch.float32), str(lora_folder)).eval()
    fading = trainee.kept["fading"]

    def form(model: Any, faded: float, ids_BT: torch.Tensor) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            fading.fill_(faded)
            return model(ids_BT).logits  # type: ignore[no-any-return]

        return call

    results: dict[str, Any] = {}
    for rows, tokens in SHAPES:
        ids_BT = _ids(base, rows, tokens)
        forms = {
            BASE: form(base, 1.0, ids_BT),
            LORA: form(lora, 1.0, ids_BT),
            ROUTED: form(trainee.model.eval(), 0.5, ids_BT),
            FADED: form(trainee.model.eval(), 1.0, ids_BT),
        }
        with torch.inference_mode():
            _check({name: call().log_softmax(-1) for name, call in forms.items()})
            results[f"{rows} x {tokens}"] = _in_turn(forms)
    return results


def _as_if_trained(trainee: Trainee) -> None:
    with torch.no_grad():
        for name, parameter in trainee.trainable.items():
            parameter.normal_(std=1.0 if "gate_weight" in name else 0.05)
    trainee.round_as_saved(torch.bfloat16)
    trainee.kept["fading"].fill_(1.0)


def _check(log_probabilities: Mapping[str, torch.Tensor]) -> None:
    """No figure without the right answer."""
    TOLERANCES["log-probabilities", torch.float32].assert_close(log_probabilities[FADED], log_probabilities[LORA])
    for one, other in ((BASE, LORA), (FADED, ROUTED)):
        assert float((log_probabilities[one] - log_probabilities[other]).abs().max()) > 0.01, (one, other)


def served(model_folder: Path, emtal_folder: Path, lora_folder: Path) -> Mapping[str, Any]:
    """Decode steps of the engine in bfloat16; the two adapters' logits are the same bit for bit."""
    model = _model(model_folder, torch.bfloat16)
    harness = Harness(model, blocks=1024, rows=max(ROWS) * PROMPT_TOKENS)
    for name, folder in (("emtal", emtal_folder), ("lora", lora_folder)):
        harness.load(name, folder)
    watch = _Stopwatch(harness)
    sampling = replace(GREEDY, max_tokens=DECODED)
    results: dict[str, Any] = {}
    for rows in ROWS:
        prompts = _ids(model, rows, PROMPT_TOKENS).tolist()
        one, other = (harness.logits([(prompt, name) for prompt in prompts]) for name in ("emtal", "lora"))
        assert torch.equal(one, other)
        times: dict[str, list[float]] = {name: [] for name in (BASE, LORA, FADED)}
        for round_ in range(WARM_UPS + ROUNDS):
            for form, adapter in zip(times, (None, "lora", "emtal"), strict=True):
                with watch.running() as steps:
                    harness.run([(prompt, adapter) for prompt in prompts], sampling)
                if round_ >= WARM_UPS:
                    times[form] += steps[1:]  # the first is the prompts'
        results[f"{rows} rows"] = {form: _figures(taken) for form, taken in times.items()}
    return results


class _Stopwatch:
    """In place of the harness's engine: takes the time of every step."""

    def __init__(self, harness: Harness) -> None:
        self._engine, self._taken_s = harness.engine, list[float]()
        self.submit = self._engine.submit
        harness.engine = self  # type: ignore[assignment]

    def step(self) -> None:
        began_s = time.perf_counter()
        self._engine.step()
        self._taken_s.append(time.perf_counter() - began_s)

    @contextmanager
    def running(self) -> Iterator[list[float]]:
        """The list is filled when the block ends."""
        self._taken_s = []
        yield self._taken_s


def _in_turn(forms: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """The forms take turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(WARM_UPS + ROUNDS):
        for name, call in forms.items():
            began_s = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began_s)
    return {name: _figures(taken[WARM_UPS:]) for name, taken in times.items()}


def _figures(taken_s: Sequence[float]) -> dict[str, float]:
    """The least tells what the work takes when nothing else runs."""
    return {"median_ms": round(1000 * median(taken_s), 2), "least_ms": round(1000 * min(taken_s), 2), "n": len(taken_s)}


def _model(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _ids(model: Any, rows: int, tokens: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=random)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    options = parser.parse_args(arguments)
    if (model := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        model = ensure_default_model()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folders = model, Path(place) / "emtal", Path(place) / "lora"
        for name, dtype, measure in (("training form", "float32", training_form), ("served", "bfloat16", served)):
            head = surroundings("torch", "transformers", "peft")
            results = measure(*folders)
            line = {
                **head,
                "arguments": {
                    "form": name,
                    "base": model.name,
                    "dtype": dtype,
                    "rank": RANK,
                    "targets": RECIPES["emtal"].targets,
                    "threads": 1,
                    "rounds": ROUNDS,
                },
                "note": "medians and least; jobs that are no part of this share the machine",
                "results": results,
            }
            append(options.out, line)
            print(name, json.dumps(results, indent=2), flush=True)


if __name__ == "__main__":
    main()
