"""The default model with the example adapters: what `make serve` serves, each against an oracle of its own method."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.methods import lower
from motet.adapters.source import read
from motet.server.model.default_model import ensure_default_model
from tests.support.bases import base_of
from tests.support.harness import GREEDY, Generated, Harness, Using
from tests.support.tolerances import TOLERANCES

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
FOLDERS = {config.parent.name: config.parent for config in sorted(EXAMPLES.glob("*/adapter_config.json"))}
CONFIGS = {name: json.loads((folder / "adapter_config.json").read_text()) for name, folder in FOLDERS.items()}
NAMES: list[str | None] = [None, *FOLDERS]
OTHERS = [
    name
    for name, config in CONFIGS.items()
    if config.get("init_lora_weights", True) is not True
    or "adapter_name" in config
    or (FOLDERS[name] / "corda_init").is_dir()
]
"""Adapters of which the saved pair is not the whole change."""
QUESTIONS = (
    "What is the highest number of points when the home team is Essendon?",
    "Is EECS 484 offered in the Winter of 2017?",
    "Is confectioners' sugar the same as powdered sugar?",
)
INITIAL = "corda_init"
ALPHA = (0.1, 0.2, 0.3, 0.4)
"""Weights of a pool's members: every one counts, and none as another."""
USING: dict[str | None, Using] = {
    name: ((name, ALPHA),) if name is not None and CONFIGS[name]["peft_type"] == "AMT" else name for name in NAMES
}
TOKENS = 12


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]


def _model(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _oracle(model_folder: Path, name: str | None, dtype: torch.dtype) -> Any:
    """The base with one adapter as its own method means it."""
    model = _model(model_folder, dtype)
    if name is None:
        return model
    folder = FOLDERS[name]
    if CONFIGS[name]["peft_type"] == "S2FT":
        return _with_selection(model, folder)
    if CONFIGS[name]["peft_type"] == "EMTAL":
        return _in_clusters(model, folder)
    if CONFIGS[name]["peft_type"] == "AMT":
        return _mixed(model, folder, CONFIGS[name])
    config = PeftConfig.from_pretrained(str(folder))
    if "adapter_name" in CONFIGS[name]:
        return _with_theta(model, folder, CONFIGS[name])
    if (folder / INITIAL).is_dir():
        _take_out(model, folder / INITIAL)
        config.init_lora_weights, config.corda_config = True, None
    return PeftModel.from_pretrained(model, str(folder), config=config).eval()


@torch.no_grad()
def _take_out(model: Any, initial: Path) -> None:
    """W - s·B0 A0 in place: what a CorDA adapter was trained on."""
    config = json.loads((initial / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for path, (a_RI, b_OR, _) in _factors(initial).items():
        weight_OI = model.get_submodule(path).weight
        weight_OI.copy_(weight_OI.double() - scale * (b_OR @ a_RI))


@torch.no_grad()
def _mixed(model: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """AMT: W - s·B0 A0 and the members' mean by ALPHA, merged."""
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for key in tensors:
        if not key.endswith(".lora_A.initial.weight"):
            continue
        stem = key.removesuffix("A.initial.weight")
        weight_OI = model.get_submodule(stem.removeprefix("base_model.model.").removesuffix(".lora_")).weight
        merged_OI = weight_OI.double()
        for label, share in (("initial", -1.0), *zip("0123", ALPHA, strict=True)):
            a_RI, b_OR = tensors[f"{stem}A.{label}.weight"].double(), tensors[f"{stem}B.{label}.weight"].double()
            merged_OI += share * scale * (b_OR @ a_RI)
        weight_OI.copy_(merged_OI)
    return model


@torch.no_grad()
def _with_selection(model: Any, folder: Path) -> Any:
    """S²FT, merged: the selected columns or rows changed."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, delta in tensors.items():
        if not key.endswith(".delta"):
            continue
        stem = key.removesuffix(".delta")
        path, _, kind = stem.removeprefix("base_model.model.").rpartition(".")
        weight_OI, index_S = model.get_submodule(path).weight, tensors[f"{stem}.index"]
        part = (slice(None), index_S) if kind == "columns" else (index_S, slice(None))
        weight_OI[part] = (weight_OI[part].double() + delta.double()).to(weight_OI.dtype)
    return model


@torch.no_grad()
def _in_clusters(model: Any, folder: Path) -> Any:
    """EMTAL as it was trained, its router faded: the channels moved into their clusters, a pair beside each linear."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, order_F in tensors.items():
        if not key.endswith(".order"):
            continue
        mlp = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".order"))
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order_F.long()].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order_F.long()].clone())
    for key, a_IR in tensors.items():
        if not key.endswith("_a"):
            continue
        parent, _, leaf = key.removeprefix("base_model.model.").removesuffix("_a").rpartition(".lora_")
        linear, b_RO = model.get_submodule(f"{parent}.{leaf}"), tensors[key.removesuffix("_a") + "_b"]
        pair = a_IR.to(linear.weight.dtype), b_RO.to(linear.weight.dtype)
        linear.register_forward_hook(lambda _, given, out, pair=pair: out + given[0] @ pair[0] @ pair[1])
    return model


@torch.no_grad()
def _with_theta(model: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """PoLAR, merged: W + alpha/r·B Θ A."""
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for path, (a_RI, b_OR, stored_RR) in _factors(folder).items():
        kinds = {"identity": stored_RR, "diagonal": stored_RR.diag().diag(), "removal": torch.eye(len(a_RI)).double()}
        weight_OI = model.get_submodule(path).weight
        change_OI = config["lora_alpha"] / config["r"] * (b_OR @ kinds[config["parameterize_S"]] @ a_RI)
        weight_OI.copy_(weight_OI.double() + change_OI)
    return model


def _factors(folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """Module path → (A, B, what is stored of Θ or nothing), float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for key, a_RI in tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix("lora_A.weight")
            theta = [tensor for other, tensor in tensors.items() if other.startswith(f"{stem}lora_S.")]
            path = stem.removeprefix("base_model.model.").removesuffix(".")
            found[path] = (a_RI, tensors[f"{stem}lora_B.weight"], theta[0] if theta else torch.empty(0))
    return found


@torch.no_grad()
def _logits(oracle: Any, prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, V] after each prompt, each alone."""
    return torch.stack([oracle(input_ids=torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts])


def _expected(
    model_folder: Path, prompts: list[list[int]], dtype: torch.dtype, tokens: int = 0
) -> dict[str | None, tuple[torch.Tensor, list[int]]]:
    """Name → logits [prompts, V] and the tokens after the first prompt; one oracle after another, for the memory."""
    made = {}
    for name in NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = _oracle(model_folder, name, dtype)
        generated: list[int] = []
        if tokens:
            ids = torch.tensor([prompts[0]])
            whole = oracle.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
            generated = whole[0, len(prompts[0]) :].tolist()
        made[name] = _logits(oracle, prompts), generated
    return made


@pytest.fixture(scope="module")
def exact(model_folder: Path, prompts: list[list[int]]) -> dict[str | None, tuple[torch.Tensor, list[int]]]:
    """What the oracles answer in float32."""
    return _expected(model_folder, prompts, torch.float32, TOKENS)


def _run(model_folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> dict[str | None, list[Generated]]:
    """What Motet answers, all prompts of all adapters in one batch."""
    harness = Harness(_model(model_folder, dtype), arena_bytes=256 << 20, block_size=16, rows=512, generations=64)
    for name, folder in FOLDERS.items():
        harness.load(name, folder)
    sampling = replace(GREEDY, max_tokens=TOKENS, stop_token_ids=harness.loaded.end_tokens)
    made = harness.run([(prompt, USING[name]) for name in NAMES for prompt in prompts], sampling)
    # Rows of the base and of low-rank adapters in whole native steps; those of S²FT beside them, through the modules.
    assert harness.runner.rows.keys() == {"native", "sparse"}
    assert harness.runner.rows["native"] > 5 * harness.runner.rows["sparse"]
    return {name: made[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def made(model_folder: Path, prompts: list[list[int]]) -> dict[str | None, list[Generated]]:
    return _run(model_folder, prompts, torch.float32)


def test_there_are_three_clearly_different_examples() -> None:
    assert len(FOLDERS) >= 3
    keys = ("peft_type", "use_dora", "use_rslora", "r", "init_lora_weights", "adapter_name")
    kinds = {(*(config.get(key) for key in keys), len(config.get("target_modules", []))) for config in CONFIGS.values()}
    assert len(kinds) == len(FOLDERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_float32_logits_and_tokens_are_the_oracles(
    name: str | None,
    exact: dict[str | None, tuple[torch.Tensor, list[int]]],
    made: dict[str | None, list[Generated]],
) -> None:
    logits, tokens = exact[name]
    actual = torch.stack([result.logits[0] for result in made[name]])
    TOLERANCES["logits", torch.float32].assert_close(actual, logits)
    assert made[name][0].tokens == tokens
    if name is not None:
        assert (logits - exact[None][0]).abs().max() > 1


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_the_oracles_are(
    model_folder: Path, prompts: list[list[int]], exact: dict[str | None, tuple[torch.Tensor, list[int]]]
) -> None:
    """bfloat16 has no exact answer to compare with; what can be asked is not to be further off than the oracle is."""
    theirs, ours = _expected(model_folder, prompts, torch.bfloat16), _run(model_folder, prompts, torch.bfloat16)

    def error(logits: torch.Tensor, name: str | None) -> float:
        return float((logits - exact[name][0]).square().mean(1).sqrt().mean())

    plain = [name for name in NAMES if name is None or name not in OTHERS]
    their_errors = [error(theirs[name][0], name) for name in plain]
    our_errors = [error(torch.stack([result.logits[0] for result in ours[name]]), name) for name in plain]
    assert min(their_errors) > 0
    ratio = sum(our_errors) / sum(their_errors)
    limit = TOLERANCES["bfloat16 error over PEFT's", torch.bfloat16].rtol
    assert ratio <= limit, f"{ratio:.2f}: {our_errors}, not {their_errors}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_operands_in_bfloat16_keep_what_was_trained(
    name: str,
    model_folder: Path,
    prompts: list[list[int]],
    exact: dict[str | None, tuple[torch.Tensor, list[int]]],
) -> None:
    """Only the operands are rounded: the noise of a whole model in bfloat16 would hide what they lose."""
    model = _model(model_folder, torch.float32)
    lowered = lower(read(FOLDERS[name]), base_of(model))
    with torch.no_grad():
        for path, effects in lowered.effects.items():
            assert effects.low_rank is not None
            a_RI, b_OR = effects.low_rank.a_RI.bfloat16().float(), effects.low_rank.b_OR.bfloat16().float()
            model.get_submodule(path).weight.add_(b_OR @ a_RI)
    TOLERANCES["logits, bfloat16 operands", torch.bfloat16].assert_close(_logits(model, prompts), exact[name][0])
