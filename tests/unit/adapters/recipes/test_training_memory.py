"""What the memory of training is counted with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from motet.adapters.recipes.run import Base, Order
from tests.bench import training_memory
from tests.support.models import tiny_llama


@pytest.mark.parametrize("method", ["full", "lisa", "lora"])
def test_gradients_and_moments_are_those_of_what_trains_at_a_time(
    method: str, base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    """float32: a gradient and two moments for each element, and a float32 count of the steps for each tensor."""
    model = tiny_llama(num_hidden_layers=5, vocab_size=320, max_position_embeddings=512)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    outside, pair = 320 * 48 + 48, 3 * (48 + 48) + 3 * (48 + 24)
    elements, tensors = {
        "full": (outside + 5 * layer, 2 + 5 * 9),
        "lisa": (outside + 2 * layer, 2 + 2 * 9),
        "lora": (5 * pair, 5 * 4),
    }[method]
    found = training_memory.measure(order(method), Base("deep", model, base().tokenizer), data)
    assert (found.trained, found.gradient_bytes) == (elements, 4 * elements)
    assert found.moment_bytes == 8 * elements + 4 * tensors
    assert 0 < found.loaded_bytes <= found.peak_bytes < 2**36
    assert len(found.step_cpu_s) == 6


def test_every_line_is_a_recipes_own_order_but_for_the_targets_of_one() -> None:
    orders = {name: training_memory.order(name) for name in training_memory.METHODS}
    assert {order.steps for order in orders.values()} == {6}
    wide, narrow = orders[training_memory.SEVEN], orders["lora"]
    assert (wide.method, wide.rank) == (narrow.method, narrow.rank)
    assert len(wide.targets) == 7
