"""Archives, web servers and source strings that must be refused."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable

from tests.support.file_server import FileServer
from tests.support.hostile_files import CONFIG, FORBIDDEN, MISSING, REFUSED, WEIGHTS, Refusal

MB = 1 << 20
Files = dict[str, bytes]
ELSEWHERE: Refusal = (403, "adapter_source_forbidden")
INVALID: Refusal = (400, "adapter_source_invalid")
UNAVAILABLE: Refusal = (503, "adapter_source_unavailable")


def packed(files: list[tuple[str, bytes]], *others: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in others:
            archive.addfile(member)
    return content.getvalue()


def with_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[Files], bytes]:
    """The adapter, and one empty member more."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return lambda files: packed(list(files.items()), member)


def of_headers(*headers: bytes) -> Callable[[Files], bytes]:
    return lambda _: gzip.compress(b"".join(headers) + b"\0" * 1024)


def sized(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(CONFIG)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def zeros(_: Files) -> bytes:
    """A gigabyte of zeros; the file has one megabyte."""
    member = tarfile.TarInfo("README.md")
    member.size = 1 << 30
    block = gzip.compress(b"\0" * (16 * MB), 9)
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT)) + block * 64


ARCHIVES: dict[str, tuple[Callable[[Files], bytes], Refusal]] = {
    "nothing": (lambda _: b"", REFUSED),
    "no archive": (lambda _: b"hello" * 1000, REFUSED),
    "a page of HTML": (lambda _: b"<html>" + b" " * 2000, REFUSED),
    "truncated": (lambda files: packed(list(files.items()))[:2000], REFUSED),
    "a wrong checksum": (lambda files: packed(list(files.items()))[:-8] + b"\0" * 8, REFUSED),
    "a gigabyte of zeros": (zeros, REFUSED),
    "gzip within gzip": (lambda files: gzip.compress(packed(list(files.items()))), REFUSED),
    "two thousand members": (lambda _: packed([(f"{i}.txt", b"") for i in range(2000)]), REFUSED),
    "a name twice": (lambda files: packed([*files.items(), (CONFIG, b"{}")]), REFUSED),
    "two adapters": (lambda files: packed([(f"{top}/{k}", v) for top in "ab" for k, v in files.items()]), REFUSED),
    "no adapter": (lambda _: packed([("README.md", b"hello")]), MISSING),
    "a pickle": (lambda files: packed([(CONFIG, files[CONFIG]), ("adapter_model.bin", b"x")]), REFUSED),
    "weights that lie": (lambda files: packed([(CONFIG, files[CONFIG]), (WEIGHTS, struct.pack("<Q", 2**62))]), REFUSED),
    "a negative size": (of_headers(sized(0)[:124] + b"\xff" * 12 + sized(0)[136:]), REFUSED),
    "a header of 4 GB": (of_headers(sized(1 << 32, b"x")), REFUSED),
    "a name of 4 GB": (of_headers(sized(1 << 32, b"L")), REFUSED),
    "a path upwards": (with_member("../x.json"), FORBIDDEN),
    "an absolute path": (with_member("/tmp/x.json"), FORBIDDEN),
    "a path up in between": (with_member("a/../../x.json"), FORBIDDEN),
    "a symbolic link": (with_member("golden.json", tarfile.SYMTYPE, "/etc/passwd"), FORBIDDEN),
    "a hard link": (with_member("golden.json", tarfile.LNKTYPE, CONFIG), FORBIDDEN),
    "a device": (with_member("golden.json", tarfile.CHRTYPE), FORBIDDEN),
    "a pipe": (with_member("golden.json", tarfile.FIFOTYPE), FORBIDDEN),
}

FR = "/allowed/fr"


def page(name: str, content: bytes | None = None, **more: object) -> Callable[[FileServer], object]:
    """One file of the adapter, answered otherwise."""
    path = f"{FR}/{name}"
    return lambda server: server.put(path, server.pages[path].content if content is None else content, **more)


def sending(location: str) -> Callable[[FileServer], object]:
    return lambda server: server.put(
        f"{FR}/{CONFIG}", b"", status=302, location=location.format(url=server.url, host=server.host)
    )


PAGES: dict[str, tuple[Callable[[FileServer], object], Refusal]] = {
    "no such folder": (page(CONFIG, status=404), MISSING),
    "no weights": (page(WEIGHTS, status=404), MISSING),
    "not for us": (page(CONFIG, b"s3cr3t", status=403), MISSING),
    "an error": (page(CONFIG, b"s3cr3t", status=500), UNAVAILABLE),
    "always broken off": (page(WEIGHTS, cut_at=[100] * 100), UNAVAILABLE),
    "too long a length": (page(CONFIG, length="99999"), UNAVAILABLE),
    "an impossible length": (page(CONFIG, length="-5"), UNAVAILABLE),
    "a drip of bytes": (page(WEIGHTS, drip_s=0.05), UNAVAILABLE),
    "a drip of headers": (page(WEIGHTS, drip_s=0.05, drip_header=True), UNAVAILABLE),
    "a loop": (sending(f"{FR}/{CONFIG}"), UNAVAILABLE),
    "sent to another host": (sending("http://localhost:9/allowed/x?token=s3cr3t"), ELSEWHERE),
    "sent to the metadata service": (sending("http://169.254.169.254/latest/meta-data/"), ELSEWHERE),
    "sent to a file": (sending("file:///etc/passwd"), ELSEWHERE),
    "sent to another folder": (sending("/elsewhere/x"), ELSEWHERE),
    "sent upwards": (sending("/allowed/%2e%2e/x"), ELSEWHERE),
    "sent with a password": (sending("http://user:s3cr3t@{host}/allowed/x"), ELSEWHERE),
    "not HTTP": (page(CONFIG, headers={"X": "\0"}), UNAVAILABLE),
    "encoded": (page(CONFIG, gzip.compress(b"\0" * MB), headers={"Content-Encoding": "gzip"}), REFUSED),
    "weights that lie": (page(WEIGHTS, struct.pack("<Q", 2**62) + b"\0" * MB), REFUSED),
    "a page of HTML": (page(CONFIG, b"<html>"), REFUSED),
}

SOURCES: dict[str, Refusal] = {
    "../secret": FORBIDDEN,
    "a/../../secret": FORBIDDEN,
    "/etc": FORBIDDEN,
    "/proc/self/root/etc": FORBIDDEN,
    "out": FORBIDDEN,
    "loop": MISSING,
    "a\0b": MISSING,
    "x" * 5000: MISSING,
    "~root": MISSING,
    "%2e%2e/secret": MISSING,
    "..\\secret": MISSING,
    "file:///etc/passwd": INVALID,
    "memory://bucket/x": INVALID,
    "ftp://{host}/x": INVALID,
    "{url}/elsewhere/x": ELSEWHERE,
    "{url}/allowedx/x": ELSEWHERE,
    "{url}/allowed/../elsewhere/x": INVALID,
    "{url}/allowed/%2e%2e/x": INVALID,
    "{url}/allowed/x?token=s3cr3t": INVALID,
    "http://user:s3cr3t@{host}/allowed/x": INVALID,
    "{url}/allowed/x.zip": REFUSED,
    "{url}/allowed/x#sha256=12": INVALID,
    "http://169.254.169.254/latest/meta-data/x": ELSEWHERE,
    "http://[::ffff:169.254.169.254]/x": ELSEWHERE,
    "hf://org/name@main": INVALID,
    "hf://org/name@0123456789abcdef0123456789abcdef01234567": ELSEWHERE,
    "s3://bucket/x": ELSEWHERE,
    "oci://localhost:5000/x:latest": INVALID,
    "https://host/" + "a" * 3000: INVALID,
}
