import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.make_adapters import LLAMA_LINEARS, main, make_adapters

# peft 0.21 still asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return out


def test_folders_load_with_peft_and_each_changes_the_output_a_little(llama: Path, tmp_path: Path) -> None:
    folders = make_adapters(str(llama), tmp_path, count=3)
    base = logits(LlamaForCausalLM.from_pretrained(llama))
    seen = [base]
    for folder in folders:
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), str(folder))
        seen.append(logits(adapted))
        assert 1e-4 < (seen[-1] - base).abs().max() < 0.3 * base.abs().max()
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(seen) for b in seen[:i])


def test_files_are_as_peft_itself_writes_them(llama: Path, tmp_path: Path) -> None:
    (ours,) = make_adapters(str(llama), tmp_path, count=1, ranks=[8])
    theirs = tmp_path / "peft"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LLAMA_LINEARS), task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(str(theirs))

    def read(folder: Path) -> tuple[dict[str, object], dict[str, torch.Size]]:
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["target_modules"].sort()
        weights = load_file(folder / "adapter_model.safetensors")
        return settings, {name: tensor.shape for name, tensor in weights.items()}

    assert read(ours) == read(theirs)
    assert {tensor.dtype for tensor in load_file(ours / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_ranks_alternate_and_targets_can_be_chosen(llama: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(llama),
        "--out",
        str(tmp_path),
        "--count",
        "3",
        "--ranks",
        "8,16",
        "--targets",
        "q_proj",
    ]
    assert main(arguments) == 0
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["adapter-000", "adapter-001", "adapter-002"]
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [(s["r"], s["lora_alpha"]) for s in settings] == [(8, 16), (16, 32), (8, 16)]
    assert len(load_file(folders[0] / "adapter_model.safetensors")) == 2 * 2
    assert main(arguments) == 2


def test_an_adapter_does_not_depend_on_how_many_there_are(llama: Path, tmp_path: Path) -> None:
    few = make_adapters(str(llama), tmp_path / "few", count=2)
    many = make_adapters(str(llama), tmp_path / "many", count=3)
    names = "adapter_model.safetensors"
    assert (few[1] / names).read_bytes() == (many[1] / names).read_bytes()
    assert (many[0] / names).read_bytes() != (many[2] / names).read_bytes()


def test_an_unknown_target_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['c_attn'\].*q_proj"):
        make_adapters(str(llama), tmp_path, count=1, targets=["c_attn"])
