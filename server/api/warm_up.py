"""A word from the base and its adapters before anyone asks, so that no request pays for what is done only once.

Must not know: the step thread, kernels.
"""

from __future__ import annotations

import contextlib
import time

from motet.adapters.errors import GateError
from motet.server.api.errors import ApiError
from motet.server.api.keys import ANYONE
from motet.server.api.labelling import leased
from motet.server.api.scoring import ScoringError
from motet.server.api.service import Service

TEXT = "Say a word."
LONGEST_S = 1.0


async def warm_up(service: Service, longest_s: float = LONGEST_S) -> None:
    """Draw a token with the base, then with one published adapter after the other; begin none when that much is over.

    Note: it is counted nowhere. Whoever cannot say a word (it needs a gate, or its step fails) is left to the request
    that asks for it, which is told why.
    """
    if service.base.modality != "text":
        return
    until_s = time.monotonic() + longest_s
    for name in (service.base.name, *(info.version.name for info in service.registry.published())):
        if time.monotonic() > until_s:
            return
        with contextlib.suppress(ApiError, GateError, ScoringError):
            async with leased(service, name, ANYONE) as labeller:
                await labeller.by_tokens((0,), await labeller.read({"text": TEXT}))
