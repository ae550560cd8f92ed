"""Adapters that a request names and nobody has loaded: one load for all who ask, and brief memory of what failed.

Must not know: how anything is fetched, lowered or published.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    NameBusyError,
    PublishesFullError,
    SourceNotFoundError,
)
from motet.adapters.registry import PUBLISHES
from motet.server.api.errors import ApiError, from_adapter_error

MOST_LOADING = 64
"""Names that may be loading or waiting for it; a request for one more is answered 503."""
MOST_REMEMBERED = 1024
TURNS = max(1, PUBLISHES - 1)
"""Loads at once: a place is left for administrators."""
REMEMBERED_S = 30.0
"""How long a name that could not be loaded is not tried again."""
RETRY_S = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Template:
    """A source with {name} in it."""

    text: str

    def takes(self, name: str) -> bool:
        """Whether the name may stand in it: it is one plain part of a path."""
        return _NAME.fullmatch(name) is not None and ".." not in name

    def source(self, name: str) -> str:
        """The source of the adapter of that name."""
        assert self.takes(name)
        return self.text.replace("{name}", name)


class Autoload:
    """For the event loop that requests are answered in.

    Args:
        load: publishes the source under the name. Raises AdapterError.
        known: whether the name means something already.
        wait_s: the patience of a request.
    """

    def __init__(
        self,
        template: Template,
        load: Callable[[str, str], Awaitable[object]],
        known: Callable[[str], bool],
        wait_s: float,
        remembered_s: float = REMEMBERED_S,
    ) -> None:
        self._template, self._load, self._known, self._wait_s = template, load, known, wait_s
        self._remembered_s = remembered_s
        self._turns = asyncio.Semaphore(TURNS)
        self._loading: dict[str, asyncio.Task[AdapterError | None]] = {}
        self._failed: OrderedDict[str, tuple[float, AdapterError]] = OrderedDict()

    async def ensure(self, name: str) -> None:
        """Load the adapter of that name, where it is not known and may be loaded.

        Raises:
            ApiError: it is refused, or not loaded in time; a name that cannot be loaded by itself is left as it is.
        """
        if self._known(name) or not self._template.takes(name):
            return
        until_s, failure = self._failed.get(name, (0.0, None))
        if failure is None or time.monotonic() >= until_s:
            failure = await self._shared(name)
        if failure is not None and not isinstance(failure, SourceNotFoundError):
            raise from_adapter_error(failure, "model")

    async def _shared(self, name: str) -> AdapterError | None:
        """The outcome of the one load of the name."""
        task = self._loading.get(name)
        if task is None:
            if len(self._loading) >= MOST_LOADING:
                raise _later(f"{MOST_LOADING} adapters are being loaded already; ask for {name!r} again later")
            task = self._loading[name] = asyncio.create_task(self._outcome(name))
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._wait_s)
        except TimeoutError:
            raise _later(f"adapter {name!r} is still being loaded after {self._wait_s:g} s; ask again") from None

    async def _outcome(self, name: str) -> AdapterError | None:
        try:
            async with self._turns:
                await self._load(name, self._template.source(name))
        except AdapterExistsError:
            return None
        except (NameBusyError, PublishesFullError) as error:
            return error
        except AdapterError as error:
            self._failed[name] = (time.monotonic() + self._remembered_s, error)
            self._failed.move_to_end(name)
            while len(self._failed) > MOST_REMEMBERED:
                self._failed.popitem(last=False)
            return error
        finally:
            del self._loading[name]
        self._failed.pop(name, None)
        return None


def _later(message: str) -> ApiError:
    return ApiError(503, message, code="adapter_loading", param="model", retry_after_s=RETRY_S)
