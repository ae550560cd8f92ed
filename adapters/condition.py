"""What is asked of a change beside the source; above all, what the name must mean for it to happen: compare and swap.

Must not know: HTTP, how names are kept, how versions are made.
"""

from __future__ import annotations

from dataclasses import dataclass

from motet.adapters.catalogue import Named, Quota
from motet.adapters.errors import AdapterExistsError, AdapterNotFoundError, VersionConflictError
from motet.adapters.version import Digest


@dataclass(frozen=True, slots=True)
class Condition:
    """By default there is none.

    Attributes:
        digest: the version that the name must mean.
        exists: whether the name must mean anything, or nothing; None for either.
    """

    digest: Digest | None = None
    exists: bool | None = None

    def require(self, name: str, named: Named | None) -> None:
        """Compare.

        Raises:
            AdapterNotFoundError: the name means nothing, and must.
            AdapterExistsError: it means something, and must not.
            VersionConflictError: it means another version.
        """
        if self.exists is False and named is not None:
            raise AdapterExistsError(
                f"adapter {name!r} is already loaded; unload it first, or ask for replacement (load_inplace)"
            )
        if self.exists and named is None:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded; GET /v1/models lists what is")
        now = None if named is None else named.current.digest
        if self.digest not in (None, now):
            raise VersionConflictError(
                f"adapter {name!r} is at {'no version' if now is None else f'version {now}'}, not at {self.digest}; "
                "look at what was published meanwhile, then ask again with its digest"
            )


ANY = Condition()
NEW = Condition(exists=False)
KNOWN = Condition(exists=True)


@dataclass(frozen=True, slots=True)
class Terms:
    """On which a name is changed.

    Attributes:
        condition: what the name must mean now.
        digest: what the source must have; None takes what it has.
        pinned, quota: of the name from now on; None leaves them as they are.
        preload: bring the version to the device before anybody asks for it, once nothing more urgent is to be brought.
        actor: who asks, for the audit trail.
    """

    condition: Condition = ANY
    digest: Digest | None = None
    pinned: bool | None = None
    quota: Quota | None = None
    preload: bool = False
    actor: str = "start"


NO_TERMS = Terms()
