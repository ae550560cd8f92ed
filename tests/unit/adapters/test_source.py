"""Nothing outside the roots is read, nothing that can run code is read, and nothing damaged is half read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from motet.adapters.bounded import Limits
from motet.adapters.errors import CorruptSourceError, SourceNotFoundError, UnsafeFormatError, UnsafePathError
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE, confine, read

CONFIG = {"peft_type": "LORA", "r": 2}
TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def write(folder: Path, config: bytes | None = None, weights: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    (folder / WEIGHTS_FILE).write_bytes(save(TENSORS) if weights is None else weights)
    return folder


def with_header(header: bytes, body: bytes = b"", announced: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if announced is None else announced) + header + body


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


# ------------------------------------------------------------------------------------------------------------ confine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "root" / "fr")
    write(tmp_path / "outside" / "secret")
    return tmp_path / "root"


def test_relative_and_absolute_paths_below_a_root(root: Path) -> None:
    assert confine(Path("fr"), [root]) == root / "fr"
    assert confine(root / "fr", [root]) == root / "fr"
    assert confine(Path("fr/../fr"), [root]) == root / "fr"


def test_later_roots_are_searched_too(root: Path) -> None:
    outside = root.parent / "outside"
    assert confine(Path("secret"), [root, outside]) == outside / "secret"
    assert confine(outside / "secret", [root, outside]) == outside / "secret"


def test_no_roots_means_no_loading(root: Path) -> None:
    with pytest.raises(UnsafePathError, match="--adapter-root"):
        confine(root / "fr", [])


@pytest.mark.parametrize("path", ["../outside/secret", "fr/../../outside/secret", "../root2", ".."])
def test_dots_do_not_leave(root: Path, path: str) -> None:
    with pytest.raises(UnsafePathError, match="outside every"):
        confine(Path(path), [root])


def test_absolute_path_outside(root: Path) -> None:
    with pytest.raises(UnsafePathError, match="outside every"):
        confine(root.parent / "outside" / "secret", [root])


def test_a_root_is_no_prefix_of_its_neighbour(root: Path) -> None:
    write(root.parent / "root-of-others" / "secret")
    with pytest.raises(UnsafePathError):
        confine(root.parent / "root-of-others" / "secret", [root])


@pytest.mark.parametrize("absolute", [False, True])
def test_link_that_leaves(root: Path, absolute: bool) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "secret")
    with pytest.raises(UnsafePathError, match="outside every"):
        confine(root / "link" if absolute else Path("link"), [root])


def test_link_inside_a_root(root: Path) -> None:
    (root / "latest").symlink_to("fr")
    assert confine(Path("latest"), [root]) == root / "fr"


def test_a_root_may_be_a_link_itself(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    assert confine(Path("fr"), [root.parent / "alias"]) == root / "fr"


@pytest.mark.parametrize("path", ["absent", "a\0b", "x" * 5000, "loop"])
def test_paths_that_cannot_exist_are_not_found(root: Path, path: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(SourceNotFoundError, match="check the path"):
        confine(Path(path), [root])


# --------------------------------------------------------------------------------------------------------------- read


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    files = read(write(tmp_path / "fr"))
    assert files.config == CONFIG
    assert files.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert files.tensors[name].dtype == tensor.dtype
        assert torch.equal(files.tensors[name], tensor)


def test_digest_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    assert read(write(tmp_path / "fr")).digest == read(write(tmp_path / "elsewhere" / "de")).digest


def test_digest_changes_with_either_file(tmp_path: Path) -> None:
    config = json.dumps(CONFIG).encode()
    weights = save({**TENSORS, "b": torch.zeros(2, dtype=torch.bfloat16)})
    digests = {
        read(write(tmp_path / "1")).digest,
        read(write(tmp_path / "2", config=config + b" ")).digest,
        read(write(tmp_path / "3", weights=weights)).digest,
    }
    assert len(digests) == 3


def test_config_map_mount(tmp_path: Path) -> None:
    """Kubernetes: each file is a link to ..data/FILE, and ..data a link to a dated folder."""
    folder = tmp_path / "mount"
    write(folder / "..2026_01_01")
    (folder / "..data").symlink_to("..2026_01_01")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).symlink_to(f"..data/{name}")
    assert read(folder).config == CONFIG


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_file_that_is_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder, elsewhere = write(tmp_path / "fr"), write(tmp_path / "fr-elsewhere")
    (folder / name).unlink()
    (folder / name).symlink_to(elsewhere / name)
    with pytest.raises(UnsafePathError, match=name):
        read(folder)


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "absent"):
        with pytest.raises(SourceNotFoundError, match="not a folder"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "fr")
    (folder / name).unlink()
    with pytest.raises(SourceNotFoundError, match=f"{name} is missing"):
        read(folder)
    (folder / name).mkdir()
    with pytest.raises(SourceNotFoundError, match=f"{name} is missing"):
        read(folder)


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "fr")

    def forbidden(path: Path, *_: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(SourceNotFoundError, match="'fr' cannot be read: Permission denied") as caught:
        read(folder)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_pickle_is_never_read(tmp_path: Path, pickle: str) -> None:
    folder = write(tmp_path / "fr")
    (folder / WEIGHTS_FILE).rename(folder / pickle)
    with pytest.raises(UnsafeFormatError, match="safe_serialization=True"):
        read(folder)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"{} {}",
        b"\xff\xfe\xff",
        b"[" * 100_000,
        pytest.param(b'{"r": ' + b"9" * 5000 + b"}", id="digits"),
        b"[1]",
        b'"LORA"',
        b"null",
        b'{"r": 2, "r": 3}',
        b'{"rank_pattern": {"q_proj": 2, "q_proj": 3}}',
    ],
    ids=lambda value: value[:12].decode(errors="replace"),
)
def test_config_that_is_no_object(tmp_path: Path, config: bytes) -> None:
    with pytest.raises(CorruptSourceError):
        read(write(tmp_path / "fr", config=config))


def test_duplicate_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptSourceError, match="'alpha' stands twice"):
        read(write(tmp_path / "fr", config=b'{"r": 1, "x": {"alpha": 2, "beta": 1, "alpha": 2}}'))


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "no room for a length": b"\0" * 7,
    "truncated tensors": save(TENSORS)[:-1],
    "truncated header": save(TENSORS)[:40],
    "more than announced": save(TENSORS) + b"\0",
    "length beyond the file": with_header(header(a=ONE), b"\0" * 4, announced=10_000),
    "giant length": with_header(header(a=ONE), b"\0" * 4, announced=2**63),
    "header is no JSON": with_header(b"{]", b""),
    "header nests too deeply": with_header(b"[" * 100_000),
    "header is a list": with_header(b"[]"),
    "duplicate tensor": with_header(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2), b"\0" * 4),
    "duplicate field": with_header(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    "offsets overlap": with_header(header(a=ONE, b=ONE), b"\0" * 4),
    "offsets reach beyond": with_header(header(a={**ONE, "data_offsets": [4, 8]}), b"\0" * 4),
    "offsets contradict shape": with_header(header(a={**ONE, "shape": [2]}), b"\0" * 4),
    "shape overflows": with_header(header(a={**ONE, "shape": [2**40, 2**40]}), b"\0" * 4),
    "negative shape": with_header(header(a={**ONE, "shape": [-1]}), b"\0" * 4),
    "unknown dtype": with_header(header(a={**ONE, "dtype": "F33"}), b"\0" * 4),
    "tensor is no object": with_header(header(a=3), b"\0" * 4),
    "metadata is no text": with_header(header(__metadata__={"format": 1}, a=ONE), b"\0" * 4),
    "hole": with_header(header(a={**ONE, "data_offsets": [4, 8]}), b"\0" * 8),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights(tmp_path: Path, damage: str) -> None:
    with pytest.raises(CorruptSourceError, match=WEIGHTS_FILE if "duplicate" not in damage else "stands twice"):
        read(write(tmp_path / "fr", weights=DAMAGED[damage]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(config_bytes=10), f"{CONFIG_FILE} has [0-9]+ bytes, more than the limit of 10"),
        (Limits(weights_bytes=100), f"{WEIGHTS_FILE} has [0-9]+ bytes, more than the limit of 100"),
        (Limits(header_bytes=20), "the limit is 20"),
        (Limits(tensors=1), "more than 1 tensors"),
    ],
)
def test_limits(tmp_path: Path, limits: Limits, message: str) -> None:
    folder = write(tmp_path / "fr")
    read(folder)
    with pytest.raises(CorruptSourceError, match=message):
        read(folder, limits=limits)


def test_no_message_carries_a_path_of_the_server(tmp_path: Path) -> None:
    folder = write(tmp_path / "fr", weights=b"")
    with pytest.raises(CorruptSourceError) as caught:
        read(folder)
    assert str(tmp_path) not in str(caught.value)
