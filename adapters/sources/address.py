"""Where an adapter lies, as people write it, and which places are allowed.

Must not know: how anything is fetched. One form of each address: what is compared with the allowed prefixes is what is
asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from motet.adapters.errors import ForbiddenSourceError, InvalidSourceError, UnsafeFormatError

SCHEMES = ("hf", "s3", "gs", "http", "https", "oci")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
UNREAD_ARCHIVES = (".zip", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z")
LONGEST = 2_048
"""Characters of a source."""

_OTHER_KINDS = ("models", "datasets", "spaces", "buckets", "kernels")
"""What stands in the owner's place where the hub's repository is no model."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_PART = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=@:-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Address:
    """One place.

    Attributes:
        uri: the whole of it in its one form, without a pin.
        host: host and port; the owner on the hub, the bucket of an object store.
        path: what follows, without a revision; parts joined by "/", none at either end.
        revision: of a hub repository a commit or branch, of a registry a "sha256:…" digest or tag.
        folder: below the repository; hub only.
        sha256: what an archive must have; None where nobody says.
    """

    scheme: str
    uri: str
    host: str
    path: str
    revision: str | None = None
    folder: str = ""
    sha256: str | None = None

    @property
    def is_archive(self) -> bool:
        return is_archive(self.uri)

    def pinned(self, revision: str | None) -> str:
        """The source that means what this one meant at a revision."""
        folder = f"/{self.folder}" if self.folder else ""
        plain = self.uri if revision is None else f"{self.scheme}://{self.host}/{self.path}@{revision}{folder}"
        return plain if self.sha256 is None else f"{plain}#sha256={self.sha256}"

    @property
    def fixed(self) -> bool:
        """Whether it can only ever mean the same bytes."""
        revision = (self.revision or "").removeprefix("sha256:")
        return self.sha256 is not None or (self.scheme in ("hf", "oci") and _is_fixed(self.scheme, revision))


def is_remote(source: str) -> bool:
    """Whether it is no path of this machine."""
    return "://" in source


def is_archive(name: str) -> bool:
    """Whether the name is that of an archive.

    Raises:
        UnsafeFormatError: of one that is not read.
    """
    if ending := next((ending for ending in UNREAD_ARCHIVES if name.lower().endswith(ending)), None):
        raise UnsafeFormatError(f"{ending} archives are not read; pack the adapter's folder as .tar.gz or .tar")
    return name.lower().endswith(ARCHIVES)


def split_pin(source: str) -> tuple[str, str | None]:
    """The source without `#sha256=…`, and that.

    Raises:
        InvalidSourceError: what follows # is no SHA-256, or it is no archive's.
    """
    place, mark, pin = source.partition("#")
    if not mark:
        return place, None
    sha256 = pin.removeprefix("sha256=").lower()
    if not pin.startswith("sha256=") or not _SHA256.fullmatch(sha256):
        raise InvalidSourceError("what follows # in a source is sha256= and 64 hexadecimal digits, or nothing")
    if not is_archive(place):
        raise InvalidSourceError(
            "#sha256= is the digest of an archive, and the source is none; pin a folder by the adapter's digest"
        )
    return place, sha256


def parse(source: str, *, floating: bool = False) -> Address:
    """Read a source that is no path.

    Args:
        floating: whether a revision may be a branch or a tag.

    Raises:
        InvalidSourceError: it cannot be followed; the message says what to write.
    """
    if len(source) > LONGEST or not source.isascii() or any(sign <= " " or sign in '\\"<>^`{|}' for sign in source):
        _refuse(f"a source has up to {LONGEST} characters of ASCII, without spaces, backslashes and braces")
    scheme, _, rest = source.partition("://")
    if scheme.lower() not in SCHEMES:
        _refuse(f"sources of kind {scheme[:20]!r} are not read; those of {', '.join(SCHEMES)} are, and folders")
    if "?" in rest or "%" in rest:
        _refuse("a source has no ? and no %: secrets do not belong there, credentials come from the environment")
    rest, sha256 = split_pin(rest)
    return _of_scheme(scheme.lower(), rest, sha256, floating)


def _of_scheme(scheme: str, rest: str, sha256: str | None, floating: bool) -> Address:
    host, slash, path = rest.partition("/")
    host = host.lower() if scheme in ("http", "https", "oci") else host
    if "@" in host:
        _refuse("a source names no user and no password: credentials come from the environment")
    if not slash or not _HOST.fullmatch(host.lower()):
        _refuse(
            f"a source of kind {scheme} begins {scheme}://HOST/, or with the owner or the bucket in the host's place"
        )
    host = host.removesuffix(f":{_DEFAULT_PORTS.get(scheme)}")
    path = path.removesuffix("/")
    parts = path.split("/")
    if not all(_PART.fullmatch(part) and part.strip(".") for part in parts):
        _refuse("a source's path has parts that are empty, of dots alone, or with signs that are not plain")
    uri = f"{scheme}://{host}/{path}"
    if scheme == "hf":
        return _of_hub(uri, host, path, sha256, floating)
    if scheme == "oci":
        return _of_registry(uri, host, path, sha256, floating)
    return Address(scheme, uri, host, path, sha256=sha256)


def _of_hub(uri: str, owner: str, path: str, sha256: str | None, floating: bool) -> Address:
    name, _, folder = path.partition("/")
    name, _, revision = name.partition("@")
    if "@" in folder or not name or owner in _OTHER_KINDS:
        _refuse("a source of the hub is hf://OWNER/NAME@COMMIT or hf://OWNER/NAME@COMMIT/FOLDER")
    if not floating and not _COMMIT.fullmatch(revision):
        _refuse(
            f"{name[:80]!r} is not pinned: write the commit's 40 hexadecimal digits after @, or start the server with "
            "--adapter-revisions floating"
        )
    if revision and not _TAG.fullmatch(revision):
        _refuse(f"revision {revision[:80]!r} is none; write a commit, or a branch without slashes")
    return Address("hf", uri, owner, name, revision or "main", folder, sha256)


def _of_registry(uri: str, host: str, path: str, sha256: str | None, floating: bool) -> Address:
    if sha256 is not None:
        _refuse("a source of a registry is pinned by @sha256:… and has no #sha256=")
    path, _, digest = path.partition("@")
    if digest:
        if not digest.startswith("sha256:") or not _SHA256.fullmatch(digest.removeprefix("sha256:")):
            _refuse("what follows @ in a source of a registry is sha256: and 64 hexadecimal digits")
        return Address("oci", uri, host, path, digest)
    path, _, tag = path.partition(":")
    if not floating:
        _refuse(
            f"{path[:80]!r} is not pinned: write the manifest's digest as @sha256:…, or start the server with "
            "--adapter-revisions floating"
        )
    if tag and not _TAG.fullmatch(tag):
        _refuse(f"tag {tag[:80]!r} is none")
    return Address("oci", uri, host, path, tag or "latest")


def _is_fixed(scheme: str, revision: str) -> bool:
    return bool((_COMMIT if scheme == "hf" else _SHA256).fullmatch(revision))


def _refuse(why: str) -> NoReturn:
    raise InvalidSourceError(why)


class AllowList:
    """The places that adapters may come from.

    Args:
        prefixes: beginnings of sources, each with at least a host, an owner or a bucket.

    Raises:
        InvalidSourceError: a prefix is none.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self._prefixes = [_prefix(prefix) for prefix in prefixes]

    def require(self, uri: str) -> None:
        """Refuse an address that begins with none of the prefixes.

        Raises:
            ForbiddenSourceError: it does not.
        """
        if not any(_begins(uri, prefix) for prefix in self._prefixes):
            place = uri.split("?")[0][:200]
            raise ForbiddenSourceError(
                f"{place!r} is none of the places that adapters may come from; start the server with "
                "--adapter-source PREFIX, or use one that it has"
            )

    def require_url(self, url: str) -> None:
        """As `require`, for where a server sends to: a URL that may have a query.

        Raises:
            ForbiddenSourceError: it is not allowed, or not in its one form.
        """
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port not in (None, _DEFAULT_PORTS.get(parts.scheme)) else ""
        plain = not parts.username and not parts.password and ".." not in parts.path and "%2e" not in url.lower()
        self.require(f"{parts.scheme}://{host}{port}{parts.path}" if plain else "another form of an address")


def _prefix(text: str) -> str:
    scheme, mark, rest = text.partition("://")
    host, _, path = rest.partition("/")
    host = host.lower() if scheme.lower() in ("http", "https", "oci") else host
    if not mark or scheme.lower() not in SCHEMES or not _HOST.fullmatch(host.lower()):
        raise InvalidSourceError(
            f"{text!r} is no beginning of a source; write for example hf://OWNER/, s3://BUCKET/FOLDER/ or https://HOST/"
        )
    host = host.removesuffix(f":{_DEFAULT_PORTS.get(scheme.lower())}")
    return f"{scheme.lower()}://{host}/{path}"


def _begins(uri: str, prefix: str) -> bool:
    """Whether the address is the prefix, or lies below it: a prefix ends where a part of the path does."""
    if not uri.startswith(prefix):
        return False
    ends = "/@:" if uri.startswith(("hf:", "oci:")) else "/"
    return prefix.endswith("/") or len(uri) == len(prefix) or uri[len(prefix)] in ends
