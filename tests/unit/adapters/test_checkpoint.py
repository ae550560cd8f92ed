"""Model directories are read by tensor, whole or in shards, and damaged or unsafe ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from motet.adapters.bounded import DEFAULT_LIMITS, Limits
from motet.adapters.checkpoint import INDEX, MODEL_CONFIG, WHOLE, read_checkpoint
from motet.adapters.errors import (
    CorruptSourceError,
    SourceError,
    SourceNotFoundError,
    UnsafeFormatError,
    UnsafePathError,
)
from motet.adapters.source import Layout, read

ONE = {"one": torch.arange(6.0).reshape(2, 3)}
TWO = {"two": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / MODEL_CONFIG).write_text('{"architectures": ["X"]}')
    save_file({**ONE, **TWO}, folder / WHOLE)
    return folder


@pytest.fixture
def sharded(whole: Path) -> Path:
    (whole / WHOLE).unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(ONE, whole / names[0])
    save_file(TWO, whole / names[1])
    (whole / INDEX).write_text(json.dumps({"weight_map": {"one": names[0], "two": names[1]}}))
    return whole


def test_whole_directory(whole: Path) -> None:
    config, tensors, digest = read_checkpoint(whole, DEFAULT_LIMITS)
    assert config == {"architectures": ["X"]}
    assert set(tensors) == {"one", "two"}
    assert len(tensors) == 2
    assert torch.equal(tensors["one"], ONE["one"])
    assert tensors["two"].dtype == torch.bfloat16
    assert len(digest) == 64


def test_shards_are_one_directory(sharded: Path) -> None:
    _, tensors, _ = read_checkpoint(sharded, DEFAULT_LIMITS)
    assert torch.equal(tensors["one"], ONE["one"])
    assert torch.equal(tensors["two"], TWO["two"])


def test_a_source_may_be_a_model_directory(whole: Path) -> None:
    files = read(whole)
    assert files.layout is Layout.MODEL
    assert files.config == {"architectures": ["X"]}


@pytest.mark.parametrize("file", [MODEL_CONFIG, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_the_digest_covers_every_file(sharded: Path, file: str) -> None:
    before = read_checkpoint(sharded, DEFAULT_LIMITS)[2]
    if file == MODEL_CONFIG:
        (sharded / file).write_text('{"architectures": ["Y"]}')
    else:
        name, tensor = next(iter((ONE if "00001-" in file else TWO).items()))
        save_file({name: tensor + 1}, sharded / file)
    assert read_checkpoint(sharded, DEFAULT_LIMITS)[2] != before


def refused(folder: Path, error: type[SourceError], message: str, limits: Limits = DEFAULT_LIMITS) -> None:
    with pytest.raises(error, match=message):
        read_checkpoint(folder, limits)


def test_pickles_are_refused_unread(whole: Path) -> None:
    (whole / WHOLE).rename(whole / "pytorch_model.bin")
    refused(whole, UnsafeFormatError, "pytorch_model.bin is a pickle")


def test_no_weights(whole: Path) -> None:
    (whole / WHOLE).unlink()
    refused(whole, SourceNotFoundError, "model.safetensors is missing")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, SourceNotFoundError, "model-00002-of-00002.safetensors is missing")


def test_truncated_weights(whole: Path) -> None:
    content = (whole / WHOLE).read_bytes()
    (whole / WHOLE).write_bytes(content[:-3])
    refused(whole, CorruptSourceError, "it is truncated")
    (whole / WHOLE).write_bytes(content[:20])
    refused(whole, CorruptSourceError, "announces a header")


def test_a_header_beyond_the_limit(whole: Path) -> None:
    refused(whole, CorruptSourceError, "the limit is 20", Limits(header_bytes=20))


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({**ONE, **TWO}, sharded / "model-00002-of-00002.safetensors")
    refused(sharded, CorruptSourceError, "'one' stands in two shards")


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_elsewhere(sharded: Path, place: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"one": place}}))
    refused(sharded, SourceError, "outside of its folder|missing")


@pytest.mark.parametrize("weight_map", [None, [], {"one": 1}, {"one": ""}])
def test_an_index_that_is_none(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(sharded, CorruptSourceError, "no weight_map")


def test_a_link_that_leaves(whole: Path, tmp_path: Path) -> None:
    (whole / WHOLE).rename(tmp_path / "elsewhere.safetensors")
    (whole / WHOLE).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(whole, UnsafePathError, "link that leaves")
