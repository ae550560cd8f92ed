from __future__ import annotations

import hashlib

import pytest

from motet.server.api.keys import ANYONE, Caller, KeyLineError, Keys


def test_who_asks() -> None:
    keys = Keys(["plain", "mine label=me adapters=a/*,b", "same label=me"], ["root label=ops"])
    label = f"key-{hashlib.sha256(b'plain').hexdigest()[:12]}"
    assert keys.who("Bearer plain") == Caller(label)
    assert keys.who("bearer mine") == Caller("me", adapters=("a/*", "b"))
    assert keys.who("Bearer same") == Caller("me")
    assert keys.who("Bearer root") == Caller("ops", admin=True)


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic plain", "plain", "Bearer plain ", "Bearer \udcff"]
)
def test_nobody_asks(given: str | None) -> None:
    assert Keys(["plain"]).who(given) is None
    assert Keys().who(given) == Keys(admin=["root"]).who(given) == ANYONE


def test_a_key_that_administers_and_infers_administers() -> None:
    assert Keys(["both label=a adapters=x"], ["both label=b"]).who("Bearer both") == Caller("b", admin=True)


def test_patterns_are_of_whole_names_and_mind_case() -> None:
    caller = Caller("c", adapters=("tenant/*", "sql", "v[12]"))
    seen = [name for name in ("tenant/a", "tenant", "sql", "sql2", "SQL", "v1", "v3", "") if caller.may_see(name)]
    assert seen == ["tenant/a", "sql", "v1"]
    assert caller.may_ask("sql@abc")
    assert not caller.may_ask("sql2@abc")
    assert Caller("c").may_see("anything")


@pytest.mark.parametrize(
    "part", ["label=", "label", "adapters=", "scope=x", "label=a label=b", "adapters=a adapters=b"]
)
def test_what_is_no_key_is_refused_without_being_repeated(part: str) -> None:
    with pytest.raises(KeyLineError, match="inference key 2") as error:
        Keys(["first", f"secret {part}"])
    assert "secret" not in str(error.value)


def test_an_admin_key_is_for_every_adapter() -> None:
    with pytest.raises(KeyLineError, match="leave out adapters="):
        Keys(admin=["root adapters=a"])


def test_no_key_is_in_what_people_print() -> None:
    keys = Keys(["secret-1 label=a"], ["secret-2"])
    assert "secret" not in repr(vars(keys)) + repr(keys.who("Bearer secret-2"))
