"""Random LoRA adapters in PEFT's format, to fill a server. Knows nothing of serving.

B is small but not zero, so that each adapter changes the output a little and a mixed-up one can be told. Run it from
the repository root:

    python -m tests.bench.make_adapters --model MODEL_DIR --out ADAPTERS_DIR --count 64 --ranks 8,16
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_shapes(model: str, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) features of each linear whose last name is a target; no weights are read.

    Raises:
        ValueError: the model has no linear of one of these names.
    """
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    linears = {
        path: (module.in_features, module.out_features)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
    }
    last_names = {path.rpartition(".")[2] for path in linears}
    if missing := set(targets) - last_names:
        raise ValueError(f"no linear is named {sorted(missing)}; the model has {sorted(last_names)}")
    return {path: shape for path, shape in linears.items() if path.rpartition(".")[2] in targets}


def random_weights(
    shapes: dict[str, tuple[int, int]], rank: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A ~ N(0, 1/in), so that A·x is of the size of x; B ~ N(0, std²); bfloat16, named as PEFT names them."""
    weights: dict[str, Tensor] = {}
    for path, (in_features, out_features) in shapes.items():
        a_RI = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
        b_OR = torch.randn(out_features, rank, generator=generator) * std
        weights[f"base_model.model.{path}.lora_A.weight"] = a_RI.to(torch.bfloat16)
        weights[f"base_model.model.{path}.lora_B.weight"] = b_OR.to(torch.bfloat16)
    return weights


def make_adapters(
    model: str,
    out: Path,
    count: int,
    ranks: Sequence[int] = (8, 16),
    targets: Sequence[str] = LLAMA_LINEARS,
    std: float = 0.005,
    alpha_per_rank: float = 2.0,
    seed: int = 0,
    prefix: str = "adapter-",
) -> list[Path]:
    """Writes `count` folders, ranks taken in turn; adapter i is the same whatever the count.

    Raises:
        FileExistsError: a folder of that name is there already.
        ValueError: see `linear_shapes`.
    """
    shapes = linear_shapes(model, targets)
    folders = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        folder = out / f"{prefix}{index:03d}"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        save_file(
            random_weights(shapes, rank, std, generator),
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        LoraConfig(
            r=rank,
            lora_alpha=int(alpha_per_rank * rank),
            target_modules=list(targets),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=model,
        ).save_pretrained(str(folder))
        folders.append(folder)
    return folders


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ranks(text: str) -> tuple[int, ...]:
    ranks = tuple(int(part) for part in text.split(","))
    if min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"ranks {text} must be at least 1")
    return ranks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_adapters", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder or name, for its config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--ranks", type=_ranks, default=(8, 16))
    parser.add_argument("--targets", type=_names, default=LLAMA_LINEARS)
    parser.add_argument("--std", type=float, default=0.005, help="of B (default %(default)s)")
    parser.add_argument("--alpha-per-rank", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", default="adapter-", help="of the folder names")
    options = parser.parse_args(argv)
    try:
        folders = make_adapters(**vars(options))
    except (OSError, ValueError) as error:
        print(f"no adapters made: {error}", file=sys.stderr)
        return 2
    print(f"{len(folders)} adapters in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
