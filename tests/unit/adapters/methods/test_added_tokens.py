"""Which rows of a wider vocabulary are tokens, and what is refused because nobody could say what they mean."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.base import BaseModel, Kind
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered
from motet.adapters.errors import AdapterError, ConfigError, CorruptSourceError, ShapeError, UnsupportedError
from motet.adapters.lowered_file import dump, parse
from motet.adapters.methods import lower
from motet.adapters.source import read
from motet.adapters.tokens import TOKENIZER_FILE
from motet.server.model.tokenizer import tokenizers_of
from tests.support.bases import base_of
from tests.support.layout import Layout
from tests.support.layouts_added import ADDED, ADDED_LAYOUTS, WIDER, Maker, fine_tuned, peft
from tests.support.models import VOCABULARY, tiny_llama, tiny_qwen2
from tests.support.tokenizer import word_tokenizer

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def base(model: Any, words: int = VOCABULARY) -> BaseModel:
    return dataclasses.replace(base_of(model), tokenizers=tokenizers_of(word_tokenizer(words), frozenset()))


def written(make: Maker, model: Any, folder: Path) -> Layout:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(model, folder, 1)


def lowered(layout: Layout, model: Any, words: int = VOCABULARY) -> Lowered:
    return lower(read(layout.folder), base(model, words))


def without_tokenizer(layout: Layout) -> Layout:
    for name in (TOKENIZER_FILE, "tokenizer_config.json"):
        (layout.folder / name).unlink()
    return layout


@pytest.mark.parametrize("name", ADDED_LAYOUTS)
def test_added_tokens_are_the_last_rows_of_both_ends(llama: Any, tmp_path: Path, name: str) -> None:
    found = lowered(written(ADDED_LAYOUTS[name], llama, tmp_path / "made"), llama)
    assert found.vocabulary == WIDER
    for path in (EMBEDDING, HEAD):
        effects, whole = found.effects.get(path), found.overlays.get(f"{path}.weight")
        if whole is not None:
            assert len(whole) == WIDER
        else:
            assert effects is not None
            sparse = effects.columns if path == EMBEDDING else effects.rows
            assert sparse is not None
            assert sparse.index_S[-len(ADDED) :].tolist() == list(range(VOCABULARY, WIDER))
    assert parse(dump(found)).vocabulary == WIDER


@pytest.mark.parametrize("name", ["saved-layers", "dora-ends", "lora-ends", "model"])
def test_the_dense_merge_has_the_oracles_rows(tmp_path: Path, name: str) -> None:
    model = tiny_qwen2()  # not tied: PEFT merges the pairs of tied ends into their one weight
    layout = written(ADDED_LAYOUTS[name], model, tmp_path / "made")
    found, own = lowered(layout, model), base(model)
    with torch.no_grad():
        dense = layout.oracle.merge_and_unload() if hasattr(layout.oracle, "merge_and_unload") else layout.oracle
    for path in (EMBEDDING, HEAD):
        weight_OI, _ = merge(found.effects[path], own.weight(path), None)
        merged_ND = weight_OI.T if own.targets[path].kind is Kind.EMBEDDING else weight_OI
        expected_ND = dense.get_submodule(path).weight
        torch.testing.assert_close(merged_ND, expected_ND, atol=2e-6, rtol=1e-5)


def test_tokens_in_spare_rows_need_no_new_ones(llama: Any, tmp_path: Path) -> None:
    """A base whose vocabulary is larger than its tokenizer's, as many are: the rows are there already."""
    layout = written(peft(), llama, tmp_path / "made")
    word_tokenizer(VOCABULARY - 6, ["<x>", "<y>"]).save_pretrained(layout.folder)
    found = lowered(layout, llama, words=VOCABULARY - 6)
    assert found.vocabulary == VOCABULARY
    assert not found.overlays
    assert EMBEDDING not in found.effects


def test_the_bases_own_tokenizer_adds_nothing(llama: Any, tmp_path: Path) -> None:
    layout = written(fine_tuned("up_proj", rows=VOCABULARY), llama, tmp_path / "made")
    word_tokenizer(VOCABULARY).save_pretrained(layout.folder)
    assert lowered(layout, llama).vocabulary is None


def test_the_digest_covers_the_tokenizer(llama: Any, tmp_path: Path) -> None:
    layout = written(peft(), llama, tmp_path / "made")
    before = read(layout.folder).digest
    config = layout.folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ messages }}"}))
    changed = read(layout.folder).digest
    without_tokenizer(layout)
    assert len({before, changed, read(layout.folder).digest}) == 3


def test_rows_that_only_pad_are_cut(llama: Any, tmp_path: Path) -> None:
    """A model directory without a tokenizer, filled up to a multiple of eight."""
    found = lowered(without_tokenizer(written(fine_tuned("up_proj", VOCABULARY + 8), llama, tmp_path / "m")), llama)
    assert found.vocabulary is None
    assert all("up_proj" in path for path in found.overlays)


@pytest.mark.parametrize("make", [fine_tuned("up_proj"), peft(), peft(trained=(256, 257, 258), save_layers=False)])
def test_rows_that_no_tokenizer_knows_are_refused(llama: Any, tmp_path: Path, make: Maker) -> None:
    layout = without_tokenizer(written(make, llama, tmp_path / "made"))
    with pytest.raises(ConfigError, match=r"259 rows, 3 more than 'base' has tokens.*put tokenizer\.json"):
        lowered(layout, llama)


def test_a_tokenizer_that_contradicts_the_bases_is_refused(llama: Any, tmp_path: Path) -> None:
    layout = written(peft(), llama, tmp_path / "made")
    file = layout.folder / TOKENIZER_FILE
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["w7"], words["w8"] = words["w8"], words["w7"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"disagrees.*'w7' has id 7, the adapter's tokenizer gives it id 8"):
        lowered(layout, llama)


def test_a_tokenizer_that_lacks_tokens_is_refused(llama: Any, tmp_path: Path) -> None:
    layout = written(peft(), llama, tmp_path / "made")
    word_tokenizer(VOCABULARY - 1, ["<a>"]).save_pretrained(layout.folder)
    with pytest.raises(ConfigError, match="'w255' has id 255, the adapter's tokenizer does not know it"):
        lowered(layout, llama)


@pytest.mark.parametrize(
    ("content", "error"),
    [("{", ConfigError), ('{"version": "1.0"}', ConfigError), ("x" * ((64 << 20) + 1), CorruptSourceError)],
    ids=["no JSON", "no tokenizer", "too large"],
)
def test_broken_tokenizers_are_refused(llama: Any, tmp_path: Path, content: str, error: type[AdapterError]) -> None:
    layout = written(peft(), llama, tmp_path / "made")
    (layout.folder / TOKENIZER_FILE).write_text(content)
    with pytest.raises(error, match="tokenizer") as caught:
        lowered(layout, llama)
    assert str(tmp_path) not in str(caught.value)


def test_a_head_without_the_new_rows_is_refused(tmp_path: Path) -> None:
    """PEFT leaves them out where only the embedding of an untied model is a target."""
    model = tiny_qwen2()
    layout = written(peft(target_modules=["embed_tokens"]), model, tmp_path / "made")
    with pytest.raises(
        ConfigError, match=r"tokens up to 258, but has no rows for all of them in 'lm_head'.*save_embed"
    ):
        lowered(layout, model)


def test_a_gap_between_trained_tokens_is_refused(llama: Any, tmp_path: Path) -> None:
    layout = written(peft(trained=(256, 258), save_layers=False), llama, tmp_path / "made")
    with pytest.raises(ConfigError, match="adds token 258, but the adapter has no row for 257"):
        lowered(layout, llama)


def test_an_odd_vocabulary_takes_no_tokens(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=251)
    layout = written(fine_tuned("up_proj", rows=253), model, tmp_path / "made")
    word_tokenizer(251, ["<a>", "<b>"]).save_pretrained(layout.folder)
    with pytest.raises(UnsupportedError, match=r"cannot be added.*vocabulary of 251"):
        lowered(layout, model, words=251)


def test_fewer_rows_than_the_base_are_refused(llama: Any, tmp_path: Path) -> None:
    layout = written(fine_tuned("up_proj", rows=VOCABULARY - 8), llama, tmp_path / "made")
    with pytest.raises(ShapeError, match="embed_tokens"):
        lowered(layout, llama)
