"""Images for many adapters in one batch; each row is what transformers, PEFT or the official model computes alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import amt_vit, emtal_vit
from tests.support.tolerances import TOLERANCES
from tests.support.vision import (
    LORAS,
    SAVED,
    Answer,
    Oracle,
    Using,
    VisionHarness,
    answers,
    peft_answers,
    pixels,
    save_loras,
    tiny_dinov2,
    write_emtal,
    write_pool,
)

FEATURES = TOLERANCES["image features", torch.float32]
LOGITS = TOLERANCES["logits of a converted ViT", torch.float32]
MIXTURES = ((1.0, 0.0, 0.0), (0.25, 0.5, 0.25), (0.0, 0.4, 0.6))


class Served:
    """A base with its adapters, and what each of them means."""

    def __init__(self, model: Any, folders: Mapping[str, Path], oracles: Mapping[Using, Oracle], size: int) -> None:
        self.size = size
        self.harness = VisionHarness(copy.deepcopy(model), size)
        for name, folder in folders.items():
            self.harness.registry.load(name, folder)
        lone: dict[Using, Oracle] = {None: lambda pixels_NCHW: answers(model, pixels_NCHW)}
        for name in folders.keys() - {one[0] for one in oracles if one is not None}:
            lone[name, None] = lambda pixels_NCHW, name=name: peft_answers(model, folders[name], pixels_NCHW)
        self.oracles = lone | dict(oracles)

    def check(self, count: int = 2) -> None:
        """Every use on the same images, all in one batch."""
        pixels_NCHW = pixels(count, self.size)
        places = [(index, using) for index in range(count) for using in self.oracles]
        found = self.harness.answers([(pixels_NCHW[index], using) for index, using in places])
        found_at = dict(zip(places, found, strict=True))
        for using, oracle in self.oracles.items():
            for index, expected in enumerate(oracle(pixels_NCHW)):
                close(found_at[index, using], expected)


def close(actual: Answer, expected: Answer) -> None:
    FEATURES.assert_close(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None and expected[1] is not None:
        LOGITS.assert_close(actual[1], expected[1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A ViT with a head, and adapters of every origin."""
    model, root = emtal_vit.tiny_vit(), tmp_path_factory.mktemp("classifier")
    folders = save_loras(model, root, LORAS | SAVED)
    folders["pool"], pool = write_pool(model, root)
    folders["emtal"], faded = write_emtal(model, root)
    oracles: dict[Using, Oracle] = {("pool", mixture): of_mixture(model, pool, mixture) for mixture in MIXTURES}

    def of_emtal(pixels_NCHW: torch.Tensor) -> list[Answer]:
        with_peft = peft_answers(model, folders["emtal"], pixels_NCHW)
        logits_NC = emtal_vit.timm_forward(faded.state, pixels_NCHW)
        return [(feature_D, logits_C) for (feature_D, _), logits_C in zip(with_peft, logits_NC, strict=True)]

    served = Served(model, folders, oracles | {("emtal", None): of_emtal}, emtal_vit.IMAGE)
    yield served
    served.harness.nothing_is_held()


def of_mixture(model: Any, pool: amt_vit.Official, mixture: tuple[float, ...]) -> Oracle:
    """The official merged model, with the base's head where it has one."""

    def oracle(pixels_NCHW: torch.Tensor) -> list[Answer]:
        features_ND = amt_vit.features(pool.merged(mixture), pixels_NCHW)
        head = getattr(model, "classifier", None)
        logits_NC = None if head is None else features_ND @ head.weight.double().T + head.bias.double()
        return [(one, None if logits_NC is None else logits_NC[at]) for at, one in enumerate(features_ND)]

    return oracle


def test_every_adapter_in_one_batch(classifier: Served) -> None:
    classifier.check()
    assert classifier.harness.engine.state.steps == 1


def test_the_adapters_matter(classifier: Served) -> None:
    """Any two uses are apart by far more than the tolerance, so that no row can pass for another's."""
    of_use = [oracle(pixels(1))[0][0] for oracle in classifier.oracles.values()]
    for at, one in enumerate(of_use):
        for other in of_use[at + 1 :]:
            assert (one - other).abs().max() > 100 * FEATURES.atol


def test_a_row_does_not_depend_on_its_neighbours(classifier: Served) -> None:
    """(I6) Alone, among others, and at another place of the batch."""
    image, *others = pixels(4)
    for using in classifier.oracles:
        alone = classifier.harness.answers([(image, using)])[0]
        among = [(others[0], None), (others[1], ("wide", None)), (image, using), (others[2], ("pool", MIXTURES[1]))]
        close(classifier.harness.answers(among)[2], alone)


def test_more_images_than_a_step_takes(classifier: Served) -> None:
    count = 150
    steps = classifier.harness.engine.state.steps
    found = classifier.harness.answers([(one, None) for one in pixels(count)])
    assert classifier.harness.engine.state.steps == steps + 3
    for index in (0, 63, 64, 149):
        close(found[index], classifier.oracles[None](pixels(count)[index : index + 1])[0])


def test_a_backbone_without_a_head(tmp_path: Path) -> None:
    model = amt_vit.tiny_vit()
    folders = save_loras(model, tmp_path, LORAS)
    folders["pool"], pool = write_pool(model, tmp_path)
    oracles = {("pool", mixture): of_mixture(model, pool, mixture) for mixture in MIXTURES}
    Served(model, folders, oracles, amt_vit.IMAGE).check()


@pytest.mark.parametrize("head", [False, True], ids=["backbone", "classifier"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_dinov2(tmp_path: Path, head: bool, gated: bool) -> None:
    """Layer scales act after the adapters; positions are interpolated; a classifier reads the patches' mean too."""
    model = tiny_dinov2(head=head, use_swiglu_ffn=gated)
    renamed = {"fc1": "up_proj", "fc2": "down_proj"} if gated else {}
    configs = {
        name: {**options, "target_modules": [renamed.get(one, one) for one in options["target_modules"]]}
        for name, options in (LORAS | (SAVED if head else {})).items()
    }
    Served(model, save_loras(model, tmp_path, configs), {}, 24).check()


def test_numbers_that_overflow_are_an_error_of_their_row_alone(tmp_path: Path) -> None:
    model = emtal_vit.tiny_vit()
    harness = VisionHarness(copy.deepcopy(model))
    for name, folder in save_loras(model, tmp_path, {"narrow": LORAS["narrow"]}).items():
        harness.registry.load(name, folder)
    image = pixels(1)[0]
    broken = torch.full_like(image, torch.inf)
    events = harness.ask([(image, None), (broken, ("narrow", None)), (image, ("narrow", None))])
    assert [event.error is None for event in events] == [True, False, True]
    assert "'narrow' computed NaN or infinity for this image" in (events[1].error or "")
    close((events[0].feature, events[0].class_logits), answers(model, image[None])[0])
    harness.nothing_is_held()
