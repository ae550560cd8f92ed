"""Why adapters cannot be on the device: what to say, and what to do about it.

Must not know: when that is looked at, memory itself. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from motet.adapters.lease import Resident


def too_large(resident: Resident, pinned: int, budget: int) -> str:
    """One does not fit beside what is pinned, even without all others."""
    beside = f", of which pinned adapters take {pinned:,}: unpin one," if pinned else ":"
    return (
        f"the adapter needs {resident.device_bytes:,} bytes; adapter memory has {budget:,}{beside} use a smaller "
        "adapter or raise --adapter-memory"
    )


def too_many(residents: Sequence[Resident], needed: int, budget: int) -> str:
    """A request uses several, which do not fit at the same time."""
    names = " + ".join(one.version.name for one in residents)
    return (
        f"adapters {names!r} do not fit on the device together: with those that are pinned they need {needed:,} bytes, "
        f"and adapter memory has {budget:,}; use fewer at once, or raise --adapter-memory"
    )


def unpinnable(resident: Resident, pinned: int, largest: int, budget: int) -> str:
    """Pinned ones would leave no room for the largest other one."""
    return (
        f"adapter {resident.version.name!r} cannot be pinned: pinned adapters would take {pinned:,} of the {budget:,} "
        f"bytes of adapter memory, and the largest other one needs {largest:,}; unpin one or raise --adapter-memory"
    )


def no_room_beside(needed: int, budget: int) -> str:
    """The exact form of a lossy load, which is there only while both are compared."""
    return (
        f"the exact form takes up to {needed:,} bytes while a lossy one is compared with it, and running requests "
        f"leave no such room of {budget:,}; try again later or raise --adapter-memory"
    )
