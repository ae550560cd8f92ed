"""What is known about a name and the versions behind it.

Must not know: where any of it is kept.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from motet.adapters.catalogue import Quota, Record
from motet.adapters.heads import HeadFile
from motet.adapters.receipt import Receipt
from motet.adapters.version import AdapterVersion, Digest


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known about a published adapter.

    Attributes:
        published_s: Unix time of publication.
        leases: requests that use the version now.
        head: its output head, where it has one.
        pinned: it stays on the device.
        quota: of the name; the registry does not enforce it.
        used_s: Unix time at which a request last used it; None where none did.
    """

    version: AdapterVersion
    receipt: Receipt
    published_s: float
    leases: int
    head: HeadFile | None = None
    pinned: bool = False
    quota: Quota = field(default_factory=dict)
    used_s: float | None = None


class State(enum.StrEnum):
    """Where a name stands.

    READY answers; LOADING is published for the first time; FAILED could not be restored; DRAINING is gone, and requests
    that began before still run.
    """

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Standing:
    """A name, published or not.

    Attributes:
        info: of what answers; None unless the state is READY.
        error: why it could not be restored.
        versions: what the name means and meant, the current one first.
        leases: requests by the version that they run on, replaced ones among them.
        bytes: what answers takes now, by tier.
    """

    name: str
    state: State
    info: AdapterInfo | None
    error: str | None
    pinned: bool
    quota: Quota
    versions: tuple[Record, ...]
    leases: Mapping[Digest, int]
    bytes: Mapping[str, int]
