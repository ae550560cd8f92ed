"""The same mixed batch on CUDA with the Triton kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.support.harness import Harness
from tests.support.layouts import layouts_of, make
from tests.support.models import VOCABULARY, reference_copy, tiny_llama
from tests.support.tolerances import TOLERANCES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_logits_equal_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    layouts = {
        name: make(name, reference_copy(model).float(), tmp_path / name, seed)
        for seed, name in enumerate(layouts_of("llama"))
    }
    on_cpu = Harness(reference_copy(model).float(), backend="reference", generations=64)
    on_gpu = Harness(model.to("cuda"), backend="triton", generations=64)
    chance = random.Random(9)
    requests = [
        ([chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 40))], name) for name in [None, *layouts]
    ]
    for name, layout in layouts.items():
        on_cpu.load(name, layout.folder, layout.declared)
        on_gpu.load(name, layout.folder, layout.declared)
    tolerance = TOLERANCES["logits on CUDA", dtype]
    tolerance.assert_close(on_gpu.logits(requests).cpu(), on_cpu.logits(requests))
