"""One form of each address, and what an allowed prefix allows."""

from __future__ import annotations

import pytest

from motet.adapters.errors import ForbiddenSourceError, InvalidSourceError
from motet.adapters.sources.address import Address, AllowList, parse

COMMIT, DIGEST = "0123456789abcdef0123456789abcdef01234567", "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            f"hf://org/name@{COMMIT}",
            Address("hf", f"hf://org/name@{COMMIT}", "org", "name", COMMIT),
        ),
        (
            f"hf://org/name@{COMMIT}/sub/folder/",
            Address("hf", f"hf://org/name@{COMMIT}/sub/folder", "org", "name", COMMIT, "sub/folder"),
        ),
        ("HTTPS://Models.Example:443/A/b", Address("https", "https://models.example/A/b", "models.example", "A/b")),
        ("http://[::1]:8080/a", Address("http", "http://[::1]:8080/a", "[::1]:8080", "a")),
        ("s3://Bucket/a/b", Address("s3", "s3://Bucket/a/b", "Bucket", "a/b")),
        (
            f"gs://b/x.tar.gz#sha256={'CD' * 32}",
            Address("gs", "gs://b/x.tar.gz", "b", "x.tar.gz", sha256="cd" * 32),
        ),
        (
            f"oci://Reg.example:5000/a/b@{DIGEST}",
            Address("oci", f"oci://reg.example:5000/a/b@{DIGEST}", "reg.example:5000", "a/b", DIGEST),
        ),
    ],
)
def test_one_form(source: str, expected: Address) -> None:
    assert parse(source) == expected


@pytest.mark.parametrize(
    ("source", "revision"),
    [("hf://o/n", "main"), ("hf://o/n@dev", "dev"), ("oci://r/n", "latest"), ("oci://r/n:v1", "v1")],
)
def test_what_floats_must_be_asked_for(source: str, revision: str) -> None:
    address = parse(source, floating=True)
    assert (address.revision, address.fixed) == (revision, False)
    with pytest.raises(InvalidSourceError, match="--adapter-revisions floating"):
        parse(source)


REFUSED = [
    "file:///etc/passwd",
    "ftp://host/a",
    "://host/a",
    "memory://a/b",
    "https://host",
    "https:///a",
    "https://user@host/a",
    "https://user:word@host/a",
    "https://host/a?token=s3cr3t",
    "https://host/a%2e%2e/b",
    "https://host/a/../b",
    "https://host/a/./b",
    "https://host//a",
    "https://host/a\\b",
    "https://host/a b",
    "https://host/a\nb",
    "https://host/a\0b",
    "https://hóst/a",
    "https://host/ä",
    "https://ho%73t/a",
    "https://host:99999999/a",
    "https://host/{name}",
    "https://host/a#sha256=ab",
    f"https://host/a#sha256={'ab' * 32}",
    f"https://host/a.tar#md5={'ab' * 32}",
    "https://host/" + "a" * 3000,
    f"hf://org@{COMMIT}/x",
    f"hf://org/name@{COMMIT[:39]}",
    f"hf://org/name@{COMMIT}/../x",
    f"hf://org/name@{COMMIT}/a@b",
    f"hf://datasets/org@{COMMIT}/name",
    "s3://bucket/../other/x",
    "s3://key:secret@bucket/a",
    "oci://reg/name@sha256:12",
    "oci://reg/name@md5:12",
    f"oci://reg/name@{DIGEST}#sha256={'ab' * 32}",
]


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source[:40].encode("unicode_escape").decode())
@pytest.mark.parametrize("floating", [False, True])
def test_what_cannot_be_followed(source: str, floating: bool) -> None:
    if floating and source == f"hf://org/name@{COMMIT[:39]}":
        return  # a branch may be called so
    with pytest.raises(InvalidSourceError) as refused:
        parse(source, floating=floating)
    assert not {"s3cr3t", "word", "secret"} & set(str(refused.value).replace(":", " ").split())


@pytest.mark.parametrize("source", ["https://host/a?token=x", "https://host/a%20b", "s3://key:secret@bucket/a"])
def test_where_credentials_come_from_is_said(source: str) -> None:
    with pytest.raises(InvalidSourceError, match="credentials come from the environment"):
        parse(source)


ALLOWED = ["https://models.example/fr/", "hf://org/", "hf://other/one", "s3://bucket", "oci://reg.example:5000/team/x"]


@pytest.mark.parametrize(
    "uri",
    [
        "https://models.example/fr/a",
        "hf://org/a@x",
        "hf://other/one@x",
        "s3://bucket/a",
        "oci://reg.example:5000/team/x@sha256:1",
    ],
)
def test_below_a_prefix(uri: str) -> None:
    AllowList(ALLOWED).require(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "https://models.example/",
        "https://models.example/fr",
        "https://models.example/frx/a",
        "https://models.example:8443/fr/a",
        "https://models.example.evil/fr/a",
        "http://models.example/fr/a",
        "hf://organisation/a",
        "hf://other/one-more@x",
        "s3://bucket2/a",
        "oci://reg.example:5001/team/x@sha256:1",
        "oci://reg.example:5000/team/xy@sha256:1",
        "file:///etc/passwd",
    ],
)
def test_beside_a_prefix(uri: str) -> None:
    with pytest.raises(ForbiddenSourceError, match="--adapter-source"):
        AllowList(ALLOWED).require(uri)


def test_nothing_is_allowed_until_it_is() -> None:
    with pytest.raises(ForbiddenSourceError):
        AllowList([]).require("https://models.example/a")


@pytest.mark.parametrize("prefix", ["", "https://", "https", "file:///", "/srv", "https://a b/", "*://x/", "hf:///x"])
def test_prefixes_that_are_none(prefix: str) -> None:
    with pytest.raises(InvalidSourceError, match="no beginning of a source"):
        AllowList([prefix])
