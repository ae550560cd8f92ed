"""Training of the base's own parameters: all of them, or, with LISA, a few decoder layers at a time.

    every K steps: freeze all decoder layers, then unfreeze γ of them, drawn evenly; what is outside of the layers
    (the embedding, the head where it is not tied, the last norm) always trains

What is saved is a model directory: nothing in it says what was trained, the importer compares it with the base.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2403.17919. The authors keep the optimiser's
moments of a layer that is frozen again; here the loop drops them, so that they neither take memory nor move it.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

from motet.adapters.checkpoint import MODEL_CONFIG, WHOLE
from motet.adapters.recipes.trainee import Setup, Trainee

ACTIVE_LAYERS = 2
"""γ: decoder layers that train at a time."""
INTERVAL_STEPS = 5
"""K: steps from one draw to the next."""


def drawn(seed: int, interval: int, n_layers: int) -> list[int]:
    """The layers that train in an interval, ascending: all where there are no more than γ."""
    count = min(ACTIVE_LAYERS, n_layers)
    return sorted(random.Random(f"{seed} {interval}").sample(range(n_layers), count))


def start(setup: Setup, by_layers: bool) -> Trainee:
    """Every parameter is known to the optimiser from the start: one that is unfrozen later trains as well.

    Args:
        by_layers: whether layers take turns, as LISA has it; else everything trains all the time.
    """
    model = setup.model.requires_grad_(True)
    trainable = dict(model.named_parameters())
    seed, layers = torch.initial_seed(), model.model.layers

    def take_turns(done: int, _: int) -> None:
        chosen = drawn(seed, done // INTERVAL_STEPS, len(layers))
        for number, layer in enumerate(layers):
            layer.requires_grad_(number in chosen)

    def save_model(folder: Path) -> None:
        """A model directory, the configuration last: a folder that has one is complete."""
        dtype = getattr(torch, setup.recipe.saved_dtype)
        tensors = {name: parameter.detach().to(dtype).contiguous() for name, parameter in trainable.items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WHOLE).write_bytes(save(tensors, metadata={"format": "pt"}))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        own = {
            "_name_or_path": setup.base_name,
            "architectures": [type(model).__name__],
            "dtype": setup.recipe.saved_dtype,
        }
        config = {**json.loads(model.config.to_json_string()), **own}
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    if by_layers:
        return Trainee(model, trainable, save_model, before_step=take_turns)
    return Trainee(model, trainable, save_model)


lisa, full = partial(start, by_layers=True), partial(start, by_layers=False)
