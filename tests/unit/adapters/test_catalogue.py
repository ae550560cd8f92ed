"""What the catalogue keeps is what was committed, however its process ends; nobody else writes it meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from motet.adapters import catalogue as module
from motet.adapters.catalogue import Act, Catalogue
from motet.adapters.errors import AdapterNotFoundError, CatalogueError
from motet.adapters.origin import Origin
from motet.adapters.version import Digest

BASE = "b" * 64
ORIGIN = Origin("a/folder", initial="first", approximate="svd-4")


def digest(number: int) -> Digest:
    return Digest(f"{number:064x}")


def publish(catalogue: Catalogue, name: str, number: int, origin: Origin = ORIGIN, pinned: bool = False) -> float:
    return catalogue.publish(Act("me", "publish", name), digest(number), origin, pinned, {"weight": 1.5})


def numbers(catalogue: Catalogue, name: str) -> list[int]:
    """The versions of a name, the current one first."""
    named = catalogue.find(name)
    return [] if named is None else [int(one.digest, 16) for one in named.versions]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "names.db"


def test_everything_survives_a_close(file: Path) -> None:
    catalogue = Catalogue(file, BASE)
    publish(catalogue, "fr", 1)
    at_s = publish(catalogue, "fr", 2, Origin("elsewhere", trained_on_base=True, trusted=True), pinned=True)
    publish(catalogue, "a/b:c@d", 3)
    catalogue.refused(Act("you", "publish", "fr"), "x" * 10_000)
    audited = catalogue.audited(9)
    assert (audited[0].old, audited[0].new) == (digest(2), digest(2))
    assert audited[0].outcome == "x" * 500
    catalogue.close()
    again = Catalogue(file, BASE)
    assert [named.name for named in again.names()] == ["a/b:c@d", "fr"]
    named = again.find("fr")
    assert named is not None
    assert (named.pinned, named.quota, numbers(again, "fr")) == (True, {"weight": 1.5}, [2, 1])
    assert named.current.origin == Origin("elsewhere", trained_on_base=True, trusted=True)
    assert named.current.published_s == at_s
    assert named.versions[1].origin == ORIGIN
    assert again.audited(9) == audited
    again.close()


def test_what_is_committed_is_there_without_a_close(file: Path, tmp_path: Path) -> None:
    """A copy of the files is what a killed process leaves."""
    catalogue = Catalogue(file, BASE)
    for number in range(4):
        publish(catalogue, "fr", number)
        after = tmp_path / f"after-{number}"
        after.mkdir()
        for part in file.parent.glob("names.db*"):
            shutil.copy(part, after)
        copy = Catalogue(after / file.name, BASE)
        assert numbers(copy, "fr") == list(range(number, -1, -1))
        copy.close()
    catalogue.close()


def test_a_transaction_that_breaks_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(file, BASE)
    publish(catalogue, "fr", 1)

    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(catalogue, "_audit", broken)
    for change in (lambda: publish(catalogue, "fr", 2), lambda: catalogue.remove(Act("me", "delete", "fr"))):
        with pytest.raises(CatalogueError, match="disk I/O error"):
            change()
    assert numbers(catalogue, "fr") == [1]
    monkeypatch.undo()
    publish(catalogue, "fr", 3)
    assert numbers(catalogue, "fr") == [3, 1]
    catalogue.close()


def test_writes_are_on_the_disk_before_they_are_answered(file: Path) -> None:
    catalogue = Catalogue(file, BASE)
    found = {name: catalogue._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert found == {"journal_mode": "wal", "synchronous": 2}, "2 is FULL"
    catalogue.close()


def test_only_so_many_versions_are_kept(file: Path) -> None:
    catalogue = Catalogue(file, BASE, kept=3)
    for number in (1, 2, 3, 4):
        publish(catalogue, "fr", number)
    publish(catalogue, "de", 1)
    assert numbers(catalogue, "fr") == [4, 3, 2]
    publish(catalogue, "fr", 2)
    assert numbers(catalogue, "fr") == [2, 4, 3], "a version that comes back is the latest, once"
    assert numbers(catalogue, "de") == [1]
    catalogue.remove(Act("me", "delete", "fr"))
    assert numbers(catalogue, "fr") == []
    catalogue.close()


def test_versions_are_found_by_their_first_digits() -> None:
    catalogue = Catalogue(None, BASE)
    for tail in ("aa", "ab", "bb"):
        catalogue.publish(Act("me", "publish", "fr"), Digest("0" * 20 + tail * 22), ORIGIN, False, {})
    named = catalogue.find("fr")
    assert named is not None
    assert named.version(None).digest.endswith("abab")
    assert named.version("0" * 20 + "bb").digest.endswith("bbbb")
    for asked, message in (
        ("0" * 20, "more than one"),
        ("1" * 12, "has no version 1111"),
        ("0" * 20 + "a", "than one"),
    ):
        with pytest.raises(AdapterNotFoundError, match=message):
            named.version(asked)


def test_the_audit_trail_is_bounded_and_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_AUDITED", 5)
    catalogue = Catalogue(None, BASE)
    for number in range(8):
        publish(catalogue, "fr", number)
    lines = catalogue.audited(99)
    assert [one.new for one in lines] == [digest(number) for number in (7, 6, 5, 4, 3)]
    assert [one.id for one in catalogue.audited(2)] == [8, 7]
    assert [one.id for one in catalogue.audited(2, before=7)] == [6, 5]
    assert catalogue.audited(2, before=lines[-1].id) == []


def test_one_process_at_a_time(file: Path) -> None:
    first = Catalogue(file, BASE)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert "in use by another process" in pool.apply(opened, (file,))
        publish(first, "fr", 1)
        first.close()
        assert pool.apply(opened, (file,)) == "fr"


def opened(file: Path) -> str:
    """In another process."""
    try:
        catalogue = Catalogue(file, BASE)
    except CatalogueError as error:
        return str(error)
    try:
        return " ".join(named.name for named in catalogue.names())
    finally:
        catalogue.close()


def test_another_base_model_is_refused(file: Path) -> None:
    Catalogue(file, BASE).close()
    with pytest.raises(CatalogueError, match="belongs to a base model with fingerprint bbbb"):
        Catalogue(file, "c" * 64)
    Catalogue(file, BASE).close()


def test_a_file_that_is_no_catalogue_is_refused_and_left_alone(file: Path) -> None:
    for content in (b"this is no database at all, but long enough to be looked at" * 20, b""):
        file.write_bytes(content)
        if content:
            with pytest.raises(CatalogueError, match="not a database"):
                Catalogue(file, BASE)
            assert file.read_bytes() == content
    Catalogue(file, BASE).close()  # an empty file is a new catalogue
    other = file.with_name("other.db")
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE names (x)")
    database.close()
    with pytest.raises(CatalogueError, match="has schema 0 and this Motet reads 1"):
        Catalogue(other, BASE)


def test_a_folder_that_is_not_there_is_named_without_its_path(file: Path) -> None:
    with pytest.raises(CatalogueError, match="No such file") as refusal:
        Catalogue(file.parent / "absent" / "names.db", BASE)
    assert str(file.parent) not in str(refusal.value)


def test_nobody_else_may_read_it(file: Path) -> None:
    """Sources may carry credentials."""
    before = os.umask(0)
    try:
        catalogue = Catalogue(file, BASE)
        publish(catalogue, "fr", 1)
        assert {part.stat().st_mode & 0o777 for part in file.parent.glob("names.db*")} == {0o600}
        catalogue.close()
    finally:
        os.umask(before)
