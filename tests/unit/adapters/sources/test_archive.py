"""Archives of every kind that Python writes are read the same; none leaves its folder, and none grows without bound."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from motet.adapters.bounded import DEFAULT_LIMITS, Limits
from motet.adapters.errors import CorruptSourceError, SourceError, UnsafeFormatError, UnsafePathError
from motet.adapters.sources.archive import members, unpack
from motet.adapters.sources.remote import Deadline
from tests.unit.adapters.sources.conftest import MB, read, tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
CONFIG = "adapter_config.json"


def unpacked(content: bytes, tmp_path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, bytes]:
    file = tmp_path / "packed"
    file.write_bytes(content)
    unpack(file, tmp_path / "into", limits, Deadline(60), lambda _: None)
    return read(tmp_path / "into")


def refused(
    content: bytes, tmp_path: Path, error: type[SourceError], message: str, limits: Limits = DEFAULT_LIMITS
) -> None:
    with pytest.raises(error, match=message) as found:
        unpacked(content, tmp_path, limits)
    assert str(tmp_path) not in str(found.value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./", "adapter/", "./adapter/"])
def test_an_adapters_folder(files: dict[str, bytes], tmp_path: Path, format: str, mode: str, prefix: str) -> None:
    files |= {"pissa_init/adapter_config.json": b"{}", "README.md": b"hello", "checkpoint-1/adapter_config.json": b"["}
    packed = tar({prefix + name: content for name, content in files.items()}, mode, FORMATS[format])
    expected = {name: files[name] for name in [*list(files)[:2], "pissa_init/adapter_config.json"]}
    assert unpacked(packed, tmp_path) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_names_and_sizes_are_those_that_python_reads(tmp_path: Path, format: str) -> None:
    names = ["a", "b" * 99, "c" * 100, f"{'d' * 90}/{'e' * 90}", "f/g/h", "i" * 100 + "/j"]
    names += ["ü", "k" * 255] if format != "ustar" else []
    written = {name: bytes([65 + i]) * (i * 511) for i, name in enumerate(names)}
    packed = tar(written, "w:", FORMATS[format])
    found = {member.name: b"".join(member.chunks) for member in members(io.BytesIO(packed), DEFAULT_LIMITS)}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        expected = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    assert found == expected == written


def test_what_is_not_read_is_passed_over() -> None:
    packed = tar({"a": b"x" * 5000, "b": b"y"}, "w:")
    assert [member.name for member in members(io.BytesIO(packed), DEFAULT_LIMITS)] == ["a", "b"]


def member(kind: bytes = tarfile.REGTYPE, name: str = CONFIG, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def patched(header: bytes, start: int, field: bytes) -> bytes:
    """A header with one field replaced, and the sum that goes with it."""
    changed = bytearray(header)
    changed[start : start + len(field)] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


LEAVING = ["/etc/x.json", "../x.json", "a/../../x.json", "a\\..\\x.json", "..", "/", "a/" * 600 + "x.json"]


@pytest.mark.parametrize("name", LEAVING, ids=lambda name: name[:20])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_member_leaves(tmp_path: Path, name: str, format: int) -> None:
    refused(tar({name: b"{}"}, format=format), tmp_path, UnsafePathError, "would leave the folder")
    assert not list(tmp_path.rglob("x.json"))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "something unknown"),
    ],
)
def test_only_files_and_folders(tmp_path: Path, kind: bytes, what: str) -> None:
    refused(member(kind, linkname="/etc/passwd"), tmp_path, UnsafePathError, what)


def test_a_name_that_stands_twice(files: dict[str, bytes], tmp_path: Path) -> None:
    for second in (CONFIG, f"./{CONFIG}"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in (CONFIG, second):
                archive.addfile(tarfile.TarInfo(name))
        refused(packed.getvalue(), tmp_path, CorruptSourceError, "twice")


def test_two_adapters_in_one_archive(files: dict[str, bytes], tmp_path: Path) -> None:
    refused(tar({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"}), tmp_path, CorruptSourceError, "in 2 places")
    refused(tar({f"a/{CONFIG}": b"{}", "b/golden.json": b"{}"}), tmp_path, CorruptSourceError, "in 2 places")


def test_pickles(tmp_path: Path) -> None:
    refused(tar({CONFIG: b"{}", "adapter_model.bin": b"x"}), tmp_path, UnsafeFormatError, "is a pickle")


def test_a_bomb_of_zeros(tmp_path: Path) -> None:
    """A gigabyte in a megabyte is not unpacked, and takes no memory."""
    zeros = gzip.compress(member(name="x.bin", size=1 << 30) + b"\0" * (64 * MB), 9)
    tracemalloc.start()
    refused(zeros, tmp_path, CorruptSourceError, "more than 100 times its size")
    assert tracemalloc.get_traced_memory()[1] < 4 * MB
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_in_a_header(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads such a header at once."""
    header = gzip.compress(member(kind, size=64 * MB) + b"\0" * 64 * MB, 9) + os.urandom(MB)
    tracemalloc.start()
    refused(header, tmp_path, CorruptSourceError, "has a header of 67,108,864 bytes, more than 65,536")
    assert tracemalloc.get_traced_memory()[1] < 4 * MB
    tracemalloc.stop()


def test_a_negative_size_is_none(tmp_path: Path) -> None:
    negative = patched(member(), 124, b"\xff" * 12) + b"\0" * 1024
    refused(negative, tmp_path, CorruptSourceError, "a number that is negative or too large")


def test_a_bomb_in_the_weights(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (16 * MB, 64 * MB)
    weights = struct.pack("<Q", len(header)) + header + b"\0" * (64 * MB)
    refused(tar({"adapter_model.safetensors": weights}), tmp_path, CorruptSourceError, "more than 100 times its size")
    assert sum(file.stat().st_size for file in (tmp_path / "into").rglob("*")) <= 17 * MB


def test_nested_gzip_is_no_archive(files: dict[str, bytes], tmp_path: Path) -> None:
    refused(gzip.compress(tar(files)), tmp_path, CorruptSourceError, "the archive")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (replace(DEFAULT_LIMITS, archive_bytes=100_000), "unpacks to more than 100,000 bytes"),
        (replace(DEFAULT_LIMITS, weights_bytes=100_000), "more than the limit of 100,000"),
        (replace(DEFAULT_LIMITS, members=1), "more than 1 members"),
    ],
)
def test_limits(files: dict[str, bytes], tmp_path: Path, limits: Limits, message: str) -> None:
    refused(tar(files), tmp_path, CorruptSourceError, message, limits)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty gzip": lambda _: b"\x1f\x8b",
    "truncated gzip": lambda packed: packed[: len(packed) // 2],
    "damaged gzip": lambda packed: packed[:200] + b"\0\0\0\0" + packed[204:],
    "wrong checksum of gzip": lambda packed: packed[:-8] + b"\0" * 8,
    "truncated tar": lambda packed: gzip.decompress(packed)[:700],
    "wrong sum": lambda packed: b"x" + gzip.decompress(packed)[1:],
    "no tar": lambda _: b"hello" * 500,
    "negative size": lambda _: patched(member(), 124, b"\xff" * 12) + b"\0" * 1024,
    "giant size": lambda _: patched(member(), 124, b"\x80" + b"\xff" * 11) + b"\0" * 1024,
    "size of letters": lambda _: patched(member(), 124, b"abcdefghijk\0") + b"\0" * 1024,
    "giant pax header": lambda _: member(b"x", size=1 << 33) + b"\0" * 1024,
    "negative pax header": lambda _: patched(member(b"x"), 124, b"\xff" * 12) + b"\0" * 1024,
    "giant long name": lambda _: member(b"L", size=1 << 33) + b"\0" * 1024,
    "pax record of no length": lambda _: member(b"x", size=512) + b"0 path=a\n".ljust(512, b"\0"),
    "pax record twice": lambda _: member(b"x", size=20) + b"10 path=a\n10 path=b\n".ljust(512, b"\0"),
    "pax size is negative": lambda _: member(b"x", size=11) + b"11 size=-1\n".ljust(512, b"\0") + member(),
    "name is no UTF-8": lambda _: patched(member(), 0, b"\xff\xfe.json\0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_archives(files: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    refused(DAMAGED[damage](tar(files)), tmp_path, CorruptSourceError, "the archive")


def test_a_header_is_checked_before_the_tensors_are_written(tmp_path: Path) -> None:
    weights = struct.pack("<Q", 40) + b"{]".ljust(40) + b"x" * 5 * MB
    refused(tar({"adapter_model.safetensors": weights}), tmp_path, CorruptSourceError, "not valid JSON")
    assert sum(file.stat().st_size for file in (tmp_path / "into").rglob("*.safetensors")) < MB
