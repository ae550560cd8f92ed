"""API keys: who asks, and which adapters they may see.

Must not know: HTTP beyond the Authorization header, files, quotas.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field


class KeyLineError(Exception):
    """A line that should be a key is none; the message holds no part of it that could be secret."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        label: what quotas, merges and audits call them; never the key.
        adapters: patterns of the names they may see, such as `tenant-a/*`; None is every adapter. The base is open to
            everybody.
    """

    label: str
    admin: bool = False
    adapters: tuple[str, ...] | None = None

    def may_ask(self, model: str) -> bool:
        """As `may_see`, of what a request says: a name, or `name@version`."""
        return self.may_see(model) or self.may_see(model.rpartition("@")[0])

    def may_see(self, adapter: str) -> bool:
        """Whether an adapter of that name exists for them."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, one) for one in self.adapters)


ANYONE = Caller("anonymous")
"""Whoever asks a server that has no inference keys."""


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes = field(repr=False)
    caller: Caller


class Keys:
    """The configured keys. No inference key opens inference; no admin key closes administration.

    Args:
        inference, admin: lines `KEY [label=NAME] [adapters=PATTERN,PATTERN…]`. Without a label a key goes by the
            beginning of its SHA-256. Keys of one label share its quota.

    Raises:
        KeyLineError: a line is none of that.
    """

    def __init__(self, inference: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        self._keys = [
            *(_parsed(line, f"inference key {number}", admin=False) for number, line in enumerate(inference, 1)),
            *(_parsed(line, f"admin key {number}", admin=True) for number, line in enumerate(admin, 1)),
        ]
        self.open = not inference
        self.administered = bool(admin)

    def who(self, authorization: str | None) -> Caller | None:
        """Whom the header's key belongs to; without a valid one anyone where inference is open, else None.

        Compares with every key, in constant time.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given)
        matches = [key.caller for key in self._keys if hmac.compare_digest(digest, key.digest)]
        if scheme.lower() == "bearer" and matches:
            return next((caller for caller in matches if caller.admin), matches[0])
        return ANYONE if self.open else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _parsed(line: str, place: str, *, admin: bool) -> _Key:
    key, *parts = line.split()
    given: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not (equals and value) or name not in ("label", "adapters") or name in given:
            raise KeyLineError(f"{place}: after the key only label=NAME and adapters=PATTERN,… may follow, once each")
        given[name] = value
    adapters = tuple(one for one in given.get("adapters", "").split(",") if one) or None
    if admin and adapters is not None:
        raise KeyLineError(f"{place}: an admin key sees every adapter; leave out adapters=")
    digest = _digest(key)
    return _Key(digest, Caller(given.get("label", f"key-{digest.hex()[:12]}"), admin, adapters))
