"""The hub and object stores, through the file systems that fsspec has for them.

Must not know: HTTP, where files are kept. Credentials are what each library finds in the environment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec

from motet.adapters.errors import InvalidSourceError, SourceError, SourceNotFoundError, SourceUnavailableError
from motet.adapters.sources.address import Address
from motet.adapters.sources.remote import Deadline, Opened, RemoteFile
from motet.adapters.sources.selection import DEEPEST, MOST_FILES, belongs, require_no_pickle

FIRST_BYTES = 1 << 16
"""Enough for most headers: a file that is refused by its header costs no more."""
CHUNK_BYTES = 8 << 20
EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Scheme → the extra of this package that can read it."""

FileSystems = Callable[[str], Any]
"""Scheme → an fsspec file system. Raises InvalidSourceError."""


def file_system(scheme: str) -> Any:
    """A new file system, which remembers no listing of another one.

    Raises:
        InvalidSourceError: what it needs is not installed.
    """
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        extra = EXTRAS.get(scheme, scheme)
        raise InvalidSourceError(
            f"{scheme}:// needs the extra {extra!r}: pip install 'motet[{extra}]' where the server runs"
        ) from error


class ObjectPlace:
    """A folder or an archive of a hub repository or a bucket.

    Args:
        systems: makes file systems; the first use of one is what needs its library.
    """

    def __init__(self, address: Address, deadline: Deadline, systems: FileSystems = file_system) -> None:
        self._address, self._deadline = address, deadline
        self._files: Any = systems(address.scheme)
        self.revision: str | None = None

    def files(self) -> Sequence[RemoteFile]:
        """What is listed there and can belong to an adapter."""
        address = self._address
        with _told():
            root = self._root()
            if address.is_archive:
                found = self._files.info(root)
                return [_file(root.rpartition("/")[2], root, found, address.sha256)]
            listed = self._files.find(root, maxdepth=DEEPEST, detail=True)
        self._deadline.left_s()
        if len(listed) > MOST_FILES:
            raise InvalidSourceError(f"the source has {len(listed):,} files, more than {MOST_FILES:,}; name one folder")
        names = {place.strip("/").removeprefix(f"{root}/"): place for place in listed}
        require_no_pickle(names)
        return [_file(name, place, listed[place]) for name, place in names.items() if belongs(name)]

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, tag: str | None) -> Iterator[Opened]:
        """As Remote says."""
        start = start if tag is not None and tag == file.tag else 0
        with _told(), self._files.open(file.place, "rb", cache_type="none") as content:
            yield Opened(_chunks(content, start, self._deadline), start, file.size, file.tag)

    def _root(self) -> str:
        address = self._address
        if address.scheme != "hf":
            return f"{address.host}/{address.path}"
        name = f"{address.host}/{address.path}"
        self.revision = address.revision if address.fixed else _commit(name, address.revision, self._files.endpoint)
        self._deadline.left_s()
        return f"{name}@{self.revision}/{address.folder}".rstrip("/")


def _commit(name: str, branch: str | None, endpoint: str) -> str:
    """The commit that a branch is at now."""
    from huggingface_hub import HfApi

    commit = HfApi(endpoint=endpoint).repo_info(name, revision=branch).sha
    if commit is None:
        raise SourceUnavailableError("the hub does not say which commit the branch is at; name a commit")
    return str(commit)


def _file(name: str, place: str, info: Any, sha256: str | None = None) -> RemoteFile:
    size = info.get("size")
    tag = next((str(info[key]) for key in ("blob_id", "ETag", "etag", "md5Hash") if info.get(key)), None)
    stored = getattr(info.get("lfs"), "sha256", None)
    return RemoteFile(name, place, None if size is None else int(size), tag, sha256 or stored)


def _chunks(content: Any, start: int, deadline: Deadline) -> Iterator[bytes]:
    with _told():
        content.seek(start)
        wanted = CHUNK_BYTES if start else FIRST_BYTES
        while chunk := content.read(wanted):
            yield chunk
            deadline.left_s()
            wanted = CHUNK_BYTES


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors of the libraries as ours; their texts may hold addresses with secrets and are left out."""
    try:
        yield
    except SourceError:
        raise
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise SourceNotFoundError("at the source there is nothing, or nothing for this server's credentials") from error
    except Exception as error:  # each library has errors of its own, and its servers' beside them
        raise SourceUnavailableError(f"the source cannot be read ({type(error).__name__}); check it") from error
