"""The same mixed batch on CUDA with the Triton kernels."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import ADAPTERS, adapters_of
from tests.support.harness import Harness
from tests.support.models import VOCABULARY, reference_copy, save_peft, tiny_llama
from tests.support.tolerances import TOLERANCES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_logits_equal_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {
            name: save_peft(tiny_llama(), tmp_path / name, ADAPTERS[name](), seed)
            for seed, name in enumerate(adapters_of("llama"))
        }
    on_cpu = Harness(reference_copy(model).float(), backend="reference")
    on_gpu = Harness(model.to("cuda"), backend="triton")
    chance = random.Random(9)
    requests = [
        ([chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 40))], name) for name in [None, *folders]
    ]
    for name, folder in folders.items():
        on_cpu.load(name, folder)
        on_gpu.load(name, folder)
    tolerance = TOLERANCES["logits on CUDA", dtype]
    tolerance.assert_close(on_gpu.logits(requests).cpu(), on_cpu.logits(requests))
