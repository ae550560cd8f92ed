"""The hub and object stores through their own libraries, registries by digests, and paths of this machine."""

from __future__ import annotations

import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import HfFileSystem

from motet.adapters.errors import (
    CorruptSourceError,
    ForbiddenSourceError,
    InvalidSourceError,
    SourceError,
    SourceNotFoundError,
    SourceUnavailableError,
    UnsafeFormatError,
    UnsafePathError,
)
from motet.adapters.sources.address import parse
from motet.adapters.sources.objects import ObjectPlace, file_system
from motet.adapters.sources.remote import Deadline
from tests.support.file_server import FileServer, hub, oci_registry, push
from tests.unit.adapters.sources.conftest import Opener, read, tar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAR, FILE = "application/vnd.oci.image.layer.v1.tar+gzip", "application/octet-stream"


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def repository(files: dict[str, bytes]) -> Iterator[FileServer]:
    beside = {"README.md": b"hello", "optimizer.pt": b"x", "checkpoint-1/adapter_config.json": b"["}
    nested = {f"nested/fr/{name}": content for name, content in files.items()}
    packed = {"packed.tar.gz": tar(files)}
    with hub({"org/name": {COMMIT: {**files, **beside, **nested, **packed}}}, {"main": COMMIT}) as server:
        yield server


def of_hub(server: FileServer) -> Any:
    return lambda _: HfFileSystem(endpoint=server.url, token=False, skip_instance_cache=True)


@pytest.mark.parametrize("place", ["", "/nested/fr", "/packed.tar.gz"])
def test_a_repository_at_a_commit(repository: FileServer, files: dict[str, bytes], opened: Opener, place: str) -> None:
    sources = opened("hf://org/", systems=of_hub(repository))
    with sources.fetch(f"hf://org/name@{COMMIT}{place}") as fetched:
        assert (read(fetched.folder), fetched.revision) == (files, COMMIT)
    asked = len(repository.asked)
    with sources.fetch(f"hf://org/name@{COMMIT}{place}") as again:
        assert again == fetched
    assert len(repository.asked) == asked, "a commit cannot change"


def test_a_branch_where_branches_are_allowed(repository: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    with pytest.raises(InvalidSourceError, match="40 hexadecimal digits"):
        opened("hf://org/", systems=of_hub(repository)).fetch("hf://org/name")
    sources = opened("hf://org/", systems=of_hub(repository), floating=True)
    with sources.fetch("hf://org/name@main") as fetched:
        assert (read(fetched.folder), fetched.revision) == (files, COMMIT)


def test_a_file_of_the_hub_from_some_byte_on(repository: FileServer, files: dict[str, bytes]) -> None:
    place = ObjectPlace(parse(f"hf://org/name@{COMMIT}"), Deadline(60), of_hub(repository))
    (weights,) = [file for file in place.files() if file.name.endswith(".safetensors")]
    for tag, start in ((weights.tag, 12_345), ("another", 0), (None, 0)):
        with place.open(weights, 12_345, tag) as opened:
            assert (opened.start, opened.size) == (start, len(files[weights.name]))
            assert b"".join(opened.chunks) == files[weights.name][start:]


@pytest.mark.parametrize(
    "source", [f"hf://org/absent@{COMMIT}", f"hf://org/name@{'f' * 40}", f"hf://org/name@{COMMIT}/x"]
)
def test_what_the_hub_does_not_have(repository: FileServer, opened: Opener, source: str) -> None:
    with pytest.raises(SourceNotFoundError) as refused:
        opened("hf://org/", systems=of_hub(repository)).fetch(source)
    assert repository.url not in str(refused.value)


def test_the_hub_changes_a_file_on_its_way(repository: FileServer, files: dict[str, bytes], opened: Opener) -> None:
    true = repository.answer
    assert true is not None

    def lying(path: str, headers: dict[str, str]) -> Any:
        page = true(path, headers)
        if page and "/resolve/" in path and path.endswith(".safetensors"):
            page.content = page.content[:-1] + b"\1"
        return page

    repository.answer = lying
    with pytest.raises(CorruptSourceError, match="by which it is pinned"):
        opened("hf://org/", systems=of_hub(repository)).fetch(f"hf://org/name@{COMMIT}")


# ----------------------------------------------------------------------------------------------------- object stores


@pytest.fixture
def bucket(files: dict[str, bytes]) -> Iterator[Any]:
    """fsspec's own file system in memory, in a bucket's place."""
    memory = fsspec.filesystem("memory")
    for name, content in files.items():
        memory.pipe_file(f"/bucket/adapters/fr/{name}", content)
    memory.pipe_file("/bucket/adapters/fr/notes.txt", b"hello")
    memory.pipe_file("/bucket/fr.tar", tar(files, "w:"))
    memory.pipe_file("/bucket/pickled/adapter_config.json", b"{}")
    memory.pipe_file("/bucket/pickled/adapter_model.bin", b"x")
    yield lambda _: memory
    memory.store.clear()


@pytest.mark.parametrize("source", ["s3://bucket/adapters/fr", "gs://bucket/fr.tar"])
def test_a_bucket(bucket: Any, files: dict[str, bytes], opened: Opener, source: str) -> None:
    with opened("s3://bucket/", "gs://bucket/", systems=bucket).fetch(source) as fetched:
        assert (read(fetched.folder), fetched.uri) == (files, source)


def test_what_a_bucket_does_not_have(bucket: Any, opened: Opener) -> None:
    sources = opened("s3://bucket/", systems=bucket)
    for source in ("s3://bucket/absent", "s3://bucket/absent.tar"):
        with pytest.raises(SourceNotFoundError):
            sources.fetch(source)
    with pytest.raises(UnsafeFormatError, match="is a pickle"):
        sources.fetch("s3://bucket/pickled")


def test_a_bucket_gives_fewer_bytes_than_it_says(bucket: Any, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, true = bucket(None), bucket(None).open
    monkeypatch.setattr(memory, "open", lambda *given, **more: io.BytesIO(true(*given, **more).read()[:-1]))
    with pytest.raises(SourceUnavailableError, match=r"adapter_config\.json ended after 28 of 29 bytes"):
        opened("s3://bucket/", systems=bucket).fetch("s3://bucket/adapters/fr")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidSourceError, match=rf"pip install 'motet\[{extra}\]'"):
        file_system(scheme)


def test_an_error_of_a_library_says_no_more_than_its_kind(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(fsspec.AbstractFileSystem):
        def find(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("https://bucket?X-Amz-Signature=s3cr3t")

    caplog.set_level(logging.DEBUG)
    with pytest.raises(SourceUnavailableError, match=r"\(RuntimeError\)") as refused:
        opened("s3://bucket/", systems=lambda _: Broken()).fetch("s3://bucket/a")
    assert "s3cr3t" not in f"{refused.value}{caplog.text}"


# --------------------------------------------------------------------------------------------------------- registries


def source_of(server: FileServer, digest: str) -> str:
    return f"oci://{server.host}/team/fr@{digest}"


@pytest.mark.parametrize("token", [None, "t0ken"])
@pytest.mark.parametrize("kind", ["files", "tar"])
def test_a_manifest(files: dict[str, bytes], opened: Opener, kind: str, token: str | None) -> None:
    with oci_registry(token) as server:
        layers: list[tuple[str, str | None, bytes]] = [(TAR, None, tar({f"fr/{k}": v for k, v in files.items()}))]
        if kind == "files":
            layers = [(FILE, name, content) for name, content in {**files, "README.md": b"x"}.items()]
        digest = push(server, "team/fr", [*layers, ("application/vnd.oci.empty.v1+json", None, b"{}")])
        sources = opened(f"oci://{server.host}/team/")
        with sources.fetch(source_of(server, digest)) as fetched:
            assert (read(fetched.folder), fetched.revision) == (files, digest)
        with opened(f"oci://{server.host}/team/", floating=True).fetch(f"oci://{server.host}/team/fr") as fetched:
            assert (read(fetched.folder), fetched.revision) == (files, digest)


def test_a_blob_may_lie_elsewhere_and_gets_no_token(
    server: FileServer, files: dict[str, bytes], opened: Opener
) -> None:
    with oci_registry("t0ken") as registry:
        digest = push(registry, "team/fr", [(FILE, name, content) for name, content in files.items()])
        for path, page in registry.pages.items():
            if "/blobs/" in path:
                server.put(path, page.content)
                page.status, page.location = 307, f"{server.url}{path}?signature=x"
        with pytest.raises(ForbiddenSourceError):
            opened(f"oci://{registry.host}/").fetch(source_of(registry, digest))
        assert server.asked == []
        with opened(f"oci://{registry.host}/", f"{server.url}/v2/").fetch(source_of(registry, digest)) as fetched:
            assert read(fetched.folder) == files
        assert all("authorization" not in headers for _, headers in server.asked)


def test_a_token_of_the_environment(files: dict[str, bytes], opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    with oci_registry("t0ken") as server:
        digest = push(server, "team/fr", [(FILE, name, content) for name, content in files.items()])
        monkeypatch.setenv("MOTET_OCI_TOKENS", f"elsewhere=x {server.host}=t0ken")
        with opened(f"oci://{server.host}/").fetch(source_of(server, digest)) as fetched:
            assert read(fetched.folder) == files
        assert not [path for path in server.paths() if path.startswith("/token")]
        monkeypatch.setenv("MOTET_OCI_TOKENS", f"{server.host}=wr0ng")
        with pytest.raises(SourceNotFoundError, match="MOTET_OCI_TOKENS") as refused:
            opened(f"oci://{server.host}/", floating=True).fetch(f"oci://{server.host}/team/fr")
        assert "wr0ng" not in str(refused.value)


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_what_has_another_digest(files: dict[str, bytes], opened: Opener, what: str) -> None:
    with oci_registry() as server:
        digest = push(server, "team/fr", [(FILE, name, content) for name, content in files.items()])
        for path, page in server.pages.items():
            if f"/{what}s/" in path:
                page.content = page.content.replace(b"LORA", b"DORA").replace(b"schemaVersion", b"schemaversion")
        with pytest.raises(CorruptSourceError, match=r"has digest|has SHA-256"):
            opened(f"oci://{server.host}/").fetch(source_of(server, digest))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [(TAR, None, b"a"), (TAR, None, b"b")],
        [(TAR, None, b"a"), (FILE, "adapter_config.json", b"b")],
        [(FILE, "adapter_config.json", b"a"), (FILE, "adapter_config.json", b"b")],
        [(FILE, None, b"a")],
        [(FILE, "adapter_model.bin", b"a")],
        [(FILE, "../../adapter_config.json", b"a")],
    ],
)
def test_manifests_of_no_adapter(opened: Opener, layers: list[tuple[str, str | None, bytes]]) -> None:
    with oci_registry() as server, pytest.raises(SourceError):
        opened(f"oci://{server.host}/").fetch(source_of(server, push(server, "team/fr", layers)))


# -------------------------------------------------------------------------------------------------------------- paths


def test_paths_below_a_root(files: dict[str, bytes], opened: Opener, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "fr").mkdir(parents=True)
    with opened(roots=(root,)).fetch("fr") as fetched:
        assert (fetched.folder, fetched.uri, fetched.revision) == (root / "fr", "fr", None)
    for path in ("../root2", "/etc", "fr/../../x"):
        with pytest.raises(UnsafePathError):
            opened(roots=(root,)).fetch(path)
    with pytest.raises(UnsafePathError, match="--adapter-root"):
        opened("https://models.example/").fetch("fr")


def test_an_archive_below_a_root(files: dict[str, bytes], opened: Opener, tmp_path: Path) -> None:
    packed = tar(files)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "fr.tgz").write_bytes(packed)
    sources, digest = opened(roots=(tmp_path / "root",)), hashlib.sha256(packed).hexdigest()
    for source in ("fr.tgz", f"fr.tgz#sha256={digest}"):
        with sources.fetch(source) as fetched:
            assert read(fetched.folder) == files
            assert tmp_path / "store" in fetched.folder.parents
    with pytest.raises(CorruptSourceError, match="by which it is pinned"):
        sources.fetch(f"fr.tgz#sha256={'0' * 64}")


def test_what_is_not_allowed_is_not_asked_for(server: FileServer, opened: Opener) -> None:
    for source in (
        f"{server.url}/a",
        f"hf://org/name@{COMMIT}",
        "s3://bucket/a",
        f"oci://{server.host}/a@sha256:{'0' * 64}",
    ):
        with pytest.raises(ForbiddenSourceError, match="--adapter-source"):
            opened("https://models.example/").fetch(source)
    assert server.asked == []
