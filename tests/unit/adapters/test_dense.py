"""The dense merge of each effect is the formula of the effects, and PEFT's own merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from motet.adapters.dense import merge
from motet.adapters.effects import ColumnSparse, LowRank, OutputBias, OutputScale, RowSparse, SignDelta, TargetEffects
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
PAIR = LowRank(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0], [1.0]]))
SCALE = OutputScale(torch.tensor([1.0, 0.0, -0.5]))
BIAS = OutputBias(torch.tensor([1.0, 2.0, 3.0]))
COLUMNS = ColumnSparse(torch.tensor([1]), torch.tensor([[10.0], [20.0], [30.0]]))
ROWS = RowSparse(torch.tensor([2]), torch.tensor([[10.0, 10.0]]))
SIGN = SignDelta(torch.tensor([[0b01], [0b10], [0b11]], dtype=torch.int32), torch.tensor([0.5]))
BASE_BIAS = torch.tensor([10.0, 20.0, 30.0])


@pytest.mark.parametrize(
    ("effects", "bias", "weight", "merged_bias"),
    [
        (TargetEffects(), None, WEIGHT.tolist(), None),
        (TargetEffects(PAIR), None, [[3, 0], [3, 4], [6, 5]], None),
        (TargetEffects(PAIR, SCALE), BASE_BIAS, [[6, 0], [3, 4], [3, 2.5]], [10, 20, 30]),
        (TargetEffects(None, SCALE, BIAS), BASE_BIAS, [[2, 4], [3, 4], [2.5, 3]], [11, 22, 33]),
        (TargetEffects(bias=BIAS), None, WEIGHT.tolist(), [1, 2, 3]),
        (TargetEffects(scale=SCALE, columns=COLUMNS, rows=ROWS), None, [[2, 24], [3, 24], [7.5, 23]], None),
        (TargetEffects(scale=SCALE, sign=SIGN), None, [[3, 3], [2.5, 4.5], [2.75, 3.25]], None),
    ],
    ids=["nothing", "low rank", "low rank and scale", "scale and bias", "bias without the base's", "sparse", "signs"],
)
def test_formula(
    effects: TargetEffects, bias: torch.Tensor | None, weight: list[list[float]], merged_bias: list[float] | None
) -> None:
    before = WEIGHT.clone()
    weight_OI, bias_O = merge(effects, WEIGHT, bias)
    assert weight_OI.tolist() == weight
    assert (None if bias_O is None else bias_O.tolist()) == merged_bias
    assert torch.equal(WEIGHT, before), "the base's weight was changed"


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "r": 3}, {"use_dora": True}, {"bias": "lora_only"}], ids=str
)
def test_it_is_pefts_merge(qwen2: Bench, tmp_path: Path, options: dict[str, object]) -> None:
    folder = qwen2.save(tmp_path, target_modules=["q_proj", "up_proj"], **options)
    merged = qwen2.merged(folder)
    for target, effects in qwen2.lower(folder).effects.items():
        linear = merged.get_submodule(target)
        assert isinstance(linear, nn.Linear)
        has_bias = qwen2.base.targets[target].has_bias
        weight_OI, bias_O = merge(effects, qwen2.base.weight(target), qwen2.base.bias(target) if has_bias else None)
        TOLERANCES["dense merge", torch.float32].assert_close(weight_OI, linear.weight.detach())
        if bias_O is not None:
            TOLERANCES["dense merge", torch.float32].assert_close(bias_O, linear.bias.detach())
