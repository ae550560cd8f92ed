"""Web servers: what they hold arrives whole, what broke off goes on, and nothing else is believed of them."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from pathlib import Path

import pytest

from motet.adapters.bounded import Limits
from motet.adapters.errors import (
    CorruptSourceError,
    ForbiddenSourceError,
    SourceNotFoundError,
    SourceUnavailableError,
    UnsafeFormatError,
)
from motet.adapters.sources import web
from tests.support.file_server import FileServer
from tests.unit.adapters.sources.conftest import Opener, read, tar

WEIGHTS = "adapter_model.safetensors"


def test_a_folder_arrives_with_what_stands_beside(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    files |= {"golden.json": b"{}", "tokenizer.json": b"{}", "pissa_init/adapter_config.json": b"{}"}
    server.put_folder("/fr", {**files, "optimizer.pt": b"x"})
    with opened(f"{server.url}/").fetch(f"{server.url}/fr/") as fetched:
        assert (read(fetched.folder), fetched.uri, fetched.revision) == (files, f"{server.url}/fr", None)


def test_a_model_directory_arrives(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    model = {"config.json": b"{}", "model.safetensors": files[WEIGHTS]}
    server.put_folder("/full", model)
    with opened(f"{server.url}/").fetch(f"{server.url}/full") as fetched:
        assert read(fetched.folder) == model


def test_a_folder_that_may_change_is_asked_for_again(
    server: FileServer, files: dict[str, bytes], opened: Opener
) -> None:
    server.put_folder("/fr", files)
    sources = opened(f"{server.url}/")
    with sources.fetch(f"{server.url}/fr") as first, sources.fetch(f"{server.url}/fr") as second:
        assert first.folder == second.folder
    server.put("/fr/adapter_config.json", b"{}")
    with sources.fetch(f"{server.url}/fr") as changed:
        assert read(changed.folder)["adapter_config.json"] == b"{}"
        assert changed.folder != first.folder


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_breaks_off_goes_on(
    server: FileServer, files: dict[str, bytes], opened: Opener, ranges: bool
) -> None:
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], cut_at=[300_000, 50_000], ranges=ranges)
    with opened(f"{server.url}/").fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files
    asked = [headers.get("range") for path, headers in server.asked if path == f"/fr/{WEIGHTS}"]
    if ranges:
        assert asked == [None, "bytes=300000-", "bytes=350000-"]
    assert server.sent_bytes < (1.1 if ranges else 3) * len(files[WEIGHTS])


def test_a_later_fetch_goes_on_where_an_earlier_one_ended(
    server: FileServer, files: dict[str, bytes], opened: Opener
) -> None:
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], cut_at=[300_000, 0, 0, 0])
    sources = opened(f"{server.url}/")
    with pytest.raises(SourceUnavailableError):
        sources.fetch(f"{server.url}/fr")
    server.pages[f"/fr/{WEIGHTS}"].cut_at.clear()
    server.asked.clear()
    with sources.fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files
    assert ("bytes=300000-") in [headers.get("range") for _, headers in server.asked]


def test_a_file_that_changed_meanwhile_is_not_joined(
    server: FileServer, files: dict[str, bytes], opened: Opener
) -> None:
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS][:1000] + b"else" + files[WEIGHTS][1004:], cut_at=[300_000, 0, 0, 0])
    sources = opened(f"{server.url}/")
    with pytest.raises(SourceUnavailableError):
        sources.fetch(f"{server.url}/fr")
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS])
    with sources.fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files


def test_a_whole_file_that_was_not_yet_moved_is_asked_for_again(
    server: FileServer, files: dict[str, bytes], opened: Opener, tmp_path: Path
) -> None:
    """A process that ends between the last byte and the move leaves one: a range beyond it is a 416."""
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], cut_at=[300_000, 0, 0, 0])
    sources = opened(f"{server.url}/")
    with pytest.raises(SourceUnavailableError):
        sources.fetch(f"{server.url}/fr")
    (piece,) = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size == 300_000]
    piece.write_bytes(files[WEIGHTS])
    server.pages[f"/fr/{WEIGHTS}"].cut_at.clear()
    with sources.fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files


@pytest.mark.parametrize("wrong", ["short", "long", "unknown"])
def test_wrong_lengths(server: FileServer, files: dict[str, bytes], opened: Opener, wrong: str) -> None:
    size = len(files[WEIGHTS])
    server.put_folder("/fr", files)
    length = {"short": str(size - 5), "long": str(size + 5), "unknown": ""}[wrong]
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], length=length, ranges=False)
    sources = opened(f"{server.url}/")
    if wrong == "unknown":
        with sources.fetch(f"{server.url}/fr") as fetched:
            assert read(fetched.folder) == files
        return
    with pytest.raises(CorruptSourceError, match="400,004 bytes of tensors"):
        sources.fetch(f"{server.url}/fr")


@pytest.mark.parametrize("where", ["body", "header", "chunks"])
def test_a_slow_drip_ends_with_the_deadline(
    server: FileServer, files: dict[str, bytes], opened: Opener, where: str
) -> None:
    server.put_folder("/fr", files)
    page = server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], drip_s=0.05, drip_header=where == "header")
    if where == "chunks":
        page.content, page.length, page.headers = b"1;" + b"x" * 5000, "", {"Transfer-Encoding": "chunked"}
    started_s = time.monotonic()
    with pytest.raises(SourceUnavailableError, match=r"not read within 0\.5 s"):
        opened(f"{server.url}/").fetch(f"{server.url}/fr", timeout_s=0.5)
    assert time.monotonic() - started_s < 1.5


def test_a_server_that_says_nothing(
    server: FileServer, files: dict[str, bytes], opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "PATIENCE_S", 0.2)
    server.put("/fr/adapter_config.json", b"{}", drip_s=1)
    with pytest.raises(SourceUnavailableError, match=r"says nothing for 0\.2 s"):
        opened(f"{server.url}/").fetch(f"{server.url}/fr")


def test_redirects(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    server.put_folder("/real", files)
    for name in files:
        server.put(f"/fr/{name}", b"", status=302, location=f"/real/{name}?signature=s3cr3t")
    with opened(f"{server.url}/").fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files


def test_a_redirect_loop(server: FileServer, opened: Opener) -> None:
    server.put("/fr/adapter_config.json", b"", status=307, location="/fr/adapter_config.json")
    with pytest.raises(SourceUnavailableError, match="more than 5 times"):
        opened(f"{server.url}/").fetch(f"{server.url}/fr")
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://localhost:1/x",
        "//localhost/x",
        "file:///etc/passwd",
        "http://user@{host}/x",
        "/fr/../secret",
        "/fr/x/../../secret",
        "/secret",
        "/fr/%2e%2e/secret",
        "ftp://{host}/x",
        "http://[::1]/x",
        "http://[bad/x",
        "",
    ],
)
def test_a_redirect_leads_nowhere_else(server: FileServer, opened: Opener, location: str) -> None:
    server.put("/secret", b"{}")
    server.put("/fr/x/adapter_config.json", b"", status=302, location=location.format(host=server.host))
    with pytest.raises((ForbiddenSourceError, SourceUnavailableError)) as refused:
        opened(f"{server.url}/fr/").fetch(f"{server.url}/fr/x")
    assert set(server.paths()) == {"/fr/x/adapter_config.json"}
    assert "user" not in str(refused.value)


def test_link_local_addresses_are_not_spoken_to(
    server: FileServer, files: dict[str, bytes], opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 127.0.0.1 in the metadata service's place: a name may lead there, the number itself may be allowed."""
    server.put_folder("/fr", files)
    named = server.url.replace("127.0.0.1", "localhost")
    monkeypatch.setattr(web, "METADATA", frozenset(map(web.ipaddress.ip_address, ("127.0.0.1", "::1"))))
    with pytest.raises(ForbiddenSourceError, match="link-local"):
        opened(f"{named}/").fetch(f"{named}/fr")
    assert server.asked == []
    with opened(f"{server.url}/").fetch(f"{server.url}/fr") as fetched:
        assert read(fetched.folder) == files


@pytest.mark.parametrize(("status", "error"), [(404, SourceNotFoundError), (403, SourceNotFoundError), (500, None)])
def test_statuses(server: FileServer, opened: Opener, status: int, error: type[Exception] | None) -> None:
    server.put("/fr/adapter_config.json", b"secret text", status=status)
    with pytest.raises(error or SourceUnavailableError, match=str(status)) as refused:
        opened(f"{server.url}/").fetch(f"{server.url}/fr")
    assert "secret" not in str(refused.value)


def test_nobody_is_there(opened: Opener) -> None:
    with pytest.raises(SourceUnavailableError, match="ConnectError"):
        opened("http://127.0.0.1:1/").fetch("http://127.0.0.1:1/fr")


def test_a_lying_header_ends_the_download(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", struct.pack("<Q", len(header)) + header + b"\0" * (32 << 20))
    with pytest.raises(CorruptSourceError, match="exceeds the limits of 8 dimensions"):
        opened(f"{server.url}/").fetch(f"{server.url}/fr")
    assert server.sent_bytes < 8 << 20, "the tensors arrived nevertheless"


@pytest.mark.parametrize("length", [None, ""])
def test_a_file_beyond_the_limit(
    server: FileServer, files: dict[str, bytes], opened: Opener, length: str | None
) -> None:
    server.put_folder("/fr", files)
    server.put(f"/fr/{WEIGHTS}", files[WEIGHTS], length=length)
    with pytest.raises(CorruptSourceError, match="more than the limit of 200,000"):
        opened(f"{server.url}/", limits=Limits(weights_bytes=200_000)).fetch(f"{server.url}/fr")


def test_an_encoded_body_is_no_file(server: FileServer, opened: Opener) -> None:
    server.put("/fr/adapter_config.json", b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    with pytest.raises(CorruptSourceError, match="serve the file plainly"):
        opened(f"{server.url}/").fetch(f"{server.url}/fr")


def test_an_archive_and_its_pin(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    packed = tar(files)
    server.put("/fr.tar.gz", packed, cut_at=[100, 1000])
    sources, pin = opened(f"{server.url}/"), hashlib.sha256(packed).hexdigest()
    with sources.fetch(f"{server.url}/fr.tar.gz#sha256={pin}") as fetched:
        assert read(fetched.folder) == files
    server.pages.clear()
    with sources.fetch(f"{server.url}/fr.tar.gz#sha256={pin}") as again:
        assert again.folder == fetched.folder, "what is pinned needs no server the second time"
    server.put("/fr.tar.gz", tar(files | {"golden.json": b"{}"}))
    with pytest.raises(CorruptSourceError, match="by which it is pinned"):
        sources.fetch(f"{server.url}/fr.tar.gz#sha256={'0' * 64}")


def test_what_was_wrong_is_not_gone_on_with(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    packed = tar(files)
    sources, source = opened(f"{server.url}/"), f"{server.url}/fr.tgz#sha256={hashlib.sha256(packed).hexdigest()}"
    server.put("/fr.tgz", b"an error page with status 200", etag=None)
    with pytest.raises(CorruptSourceError, match="by which it is pinned"):
        sources.fetch(source)
    server.put("/fr.tgz", packed, etag=None)
    with sources.fetch(source) as fetched:
        assert read(fetched.folder) == files


def test_archives_that_are_not_read(server: FileServer, opened: Opener) -> None:
    for ending in (".zip", ".tar.zst", ".tar.xz"):
        with pytest.raises(UnsafeFormatError, match="pack the adapter's folder as"):
            opened(f"{server.url}/").fetch(f"{server.url}/fr{ending}")
    assert server.asked == []


def test_two_at_once_download_once(server: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    packed = tar(files)
    server.put("/fr.tar.gz", packed)
    sources, source = opened(f"{server.url}/"), f"{server.url}/fr.tar.gz#sha256={hashlib.sha256(packed).hexdigest()}"
    found: list[Path] = []

    def fetch() -> None:
        with sources.fetch(source) as fetched:
            found.append(fetched.folder)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert server.paths() == ["/fr.tar.gz"]
