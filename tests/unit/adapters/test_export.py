"""What is exported is the adapter: to PEFT, and to us."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from motet.adapters.effects import (
    ColumnSparse,
    GateSpec,
    Lowered,
    LowRank,
    OutputBias,
    OutputScale,
    RowSparse,
    SignDelta,
    TargetEffects,
)
from motet.adapters.errors import ExportError, UnsupportedError
from motet.adapters.export import export_peft, target_modules
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from tests.support.models import ALL_LINEARS, reference_copy
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

FORMS: dict[str, dict[str, Any]] = {
    "uniform": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 3, "lora_alpha": 7, "target_modules": ALL_LINEARS},
    "rslora": {"r": 5, "use_rslora": True, "target_modules": ALL_LINEARS},
    "patterns": {
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*": 5},
        "alpha_pattern": {r"self_attn\.(q|k)_proj": 3, "v_proj": 24},
    },
    "some layers": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"lm_head": 2}},
    "regex": {"target_modules": r".*\.0\.mlp\.(gate|down)_proj", "rank_pattern": {"gate_proj": 1}},
}


def modules(bench: Bench) -> list[str]:
    return [*bench.base.targets, *bench.base.other_modules]


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    return config


@pytest.mark.parametrize("form", FORMS)
def test_peft_computes_the_same_with_the_exported_adapter(llama: Bench, tmp_path: Path, form: str) -> None:
    source = llama.save(tmp_path / "source", **FORMS[form])
    export_peft(llama.lower(source), tmp_path / "out", modules(llama), embedding="model.embed_tokens")
    expected = logits(llama.peft(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = PeftModel.from_pretrained(reference_copy(llama.model), str(tmp_path / "out")).eval()
    TOLERANCES["logits", torch.float32].assert_close(logits(exported), expected)
    assert float((expected - logits(llama.model)).abs().max()) > 0.1, "the adapter does nothing: the test says nothing"
    paths = [name for name, _ in exported.named_parameters() if "lora_A" in name or "lora_embedding_A" in name]
    adapted = {name.partition(".lora_")[0] for name in paths}
    assert {name.removeprefix("base_model.model.") for name in adapted} == set(llama.lower(source).effects)


@pytest.mark.parametrize("form", FORMS)
def test_our_importer_finds_the_same_effects(llama: Bench, tmp_path: Path, form: str) -> None:
    lowered = llama.lower(llama.save(tmp_path / "source", **FORMS[form]))
    export_peft(lowered, tmp_path / "out", modules(llama), embedding="model.embed_tokens")
    again = llama.lower(tmp_path / "out")
    assert list(again.effects) == list(lowered.effects)
    for target, effects in lowered.effects.items():
        assert effects.low_rank is not None
        low_rank = again.effects[target].low_rank
        assert low_rank is not None
        product = low_rank.b_OR @ low_rank.a_RI
        TOLERANCES["dense merge", torch.float32].assert_close(product, effects.low_rank.b_OR @ effects.low_rank.a_RI)
        assert low_rank.rank == effects.low_rank.rank


def test_the_configuration_is_short(llama: Bench, tmp_path: Path) -> None:
    export_peft(llama.lower(llama.save(tmp_path / "a", target_modules=ALL_LINEARS)), tmp_path / "all", modules(llama))
    config = config_of(tmp_path / "all")
    assert config["target_modules"] == sorted(ALL_LINEARS)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})
    ragged = llama.lower(llama.save(tmp_path / "b", **FORMS["patterns"]))
    export_peft(ragged, tmp_path / "ragged", modules(llama), base_name="b", task_type="CAUSAL_LM")
    config = config_of(tmp_path / "ragged")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == 4, "the most frequent rank stands outside of the patterns"
    assert config["rank_pattern"][r"^model\.layers\.0\.mlp\.down_proj"] == 2
    assert len(config["rank_pattern"]) == 8
    assert (config["base_model_name_or_path"], config["task_type"]) == ("b", "CAUSAL_LM")


def test_bfloat16_is_rounded_after_the_scale_is_folded(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(llama.save(tmp_path / "a", target_modules=["q_proj"]))
    export_peft(lowered, tmp_path / "out", modules(llama), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert len(tensors) == 4
    for target, effects in lowered.effects.items():
        assert effects.low_rank is not None
        found = tensors[f"base_model.model.{target}.lora_B.weight"]
        assert torch.equal(found, effects.low_rank.b_OR.bfloat16())


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        (["l.0.q", "l.1.q", "l.0.k", "l.1.k"], [], ["k", "q"]),
        (["l.0.q", "l.1.q", "l.1.k"], ["l.0.k"], ["1.k", "q"]),
        (["l.0.q"], ["l.10.q"], ["0.q"]),
        (["l.0.q"], ["l.10.q", "m.0.q"], ["l.0.q"]),
        (["q"], ["l.1"], ["q"]),
        (["a.mlp.q", "b.q.mlp"], [], ["mlp.q", "q.mlp"]),
    ],
    ids=["everywhere", "some", "10 ends with 0", "whole paths", "no dot", "parents have the names"],
)
def test_target_modules_name_exactly_the_targets(targets: list[str], others: list[str], expected: list[str]) -> None:
    named = target_modules(targets, others)
    everything = {".".join(p.split(".")[:n]) for p in (*targets, *others) for n in range(1, p.count(".") + 2)}
    found = {path for path in everything if any(path == end or path.endswith(f".{end}") for end in named)}
    assert found == set(targets)
    assert named == expected


def test_a_target_that_peft_cannot_name_alone_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'q' is the end of another module's path"):
        target_modules(["q"], ["l.q"])


PAIR = LowRank(torch.ones(1, 2), torch.ones(2, 1))


def _lowered(effects: TargetEffects) -> Lowered:
    return Lowered("x", "x", "x", {"l.k": TargetEffects(PAIR), "l.q": effects}, 2)


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        (TargetEffects(PAIR, OutputScale(torch.ones(2))), r"'l\.q' has an output scale"),
        (TargetEffects(None, None, OutputBias(torch.ones(2))), r"'l\.q' has an output bias"),
        (TargetEffects(columns=ColumnSparse(torch.tensor([0]), torch.ones(2, 1))), r"'l\.q' has changed columns"),
        (TargetEffects(rows=RowSparse(torch.tensor([0]), torch.ones(1, 2))), r"'l\.q' has changed rows"),
        (TargetEffects(sign=SignDelta(torch.ones(2, 1).int(), torch.ones(1))), r"'l\.q' has one bit a weight"),
    ],
)
def test_what_a_pair_cannot_say_is_refused(tmp_path: Path, effects: TargetEffects, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        export_peft(_lowered(effects), tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []


def test_a_gate_is_refused(tmp_path: Path) -> None:
    gate = GateSpec("router", 1, {"l.k": torch.zeros(1, dtype=torch.int64)})
    lowered = Lowered("x", "x", "x", {"l.k": TargetEffects(PAIR)}, 1, gate=gate)
    with pytest.raises(UnsupportedError, match=r"gate 'router'.*export it with the gate fixed"):
        export_peft(lowered, tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []


def test_dora_is_refused(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(llama.save(tmp_path / "source", use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="output scale"):
        export_peft(lowered, tmp_path / "out", modules(llama))


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="changes nothing"):
        export_peft(Lowered("x", "x", "x", {"l.q": TargetEffects()}, 1), tmp_path / "out", [])


def test_an_empty_folder_is_filled_and_any_other_refused(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    export_peft(_lowered(TargetEffects(PAIR)), out, [])
    names = {CONFIG_FILE, WEIGHTS_FILE}
    assert {path.name for path in out.iterdir()} == names
    before = (out / WEIGHTS_FILE).stat().st_mtime_ns
    with pytest.raises(ExportError, match="'out' exists and is not an empty folder"):
        export_peft(_lowered(TargetEffects(PAIR)), out, [])
    assert (out / WEIGHTS_FILE).stat().st_mtime_ns == before
    shutil.rmtree(out)
    out.mkdir()
    export_peft(_lowered(TargetEffects(PAIR)), out, [])
    assert {path.name for path in out.iterdir()} == names
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError):
        export_peft(_lowered(TargetEffects(PAIR)), tmp_path / "file", [])
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing unfinished is left"


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("motet.adapters.export.save_file", full)
    with pytest.raises(ExportError, match="No space left") as error:
        export_peft(_lowered(TargetEffects(PAIR)), tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in str(error.value)


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object, **options: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "of-another").write_text("x")

    monkeypatch.setattr("motet.adapters.export.save_file", slow)
    with pytest.raises(ExportError):
        export_peft(_lowered(TargetEffects(PAIR)), tmp_path / "out", [])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["of-another"]
