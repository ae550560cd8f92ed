"""The loader's thread begins when there is something to do and gives way to all others."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from motet.adapters.loader import LOWERING, MOVING, Background, Loader

DEADLINE_S = 20


def own_nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_only_its_own_thread_gives_way() -> None:
    before, seen = own_nice(), []

    def turn() -> bool:
        seen.append(own_nice())
        return len(seen) < 3

    loader = Loader(turn)
    assert seen == []
    loader.start()
    loader.start()
    loader.join(DEADLINE_S)
    assert seen == [MOVING] * 3
    assert own_nice() == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_work_in_the_background_gives_way_too() -> None:
    before, background = own_nice(), Background()
    assert background.run(own_nice) == LOWERING > before
    assert own_nice() == before


def test_what_work_raises_is_raised() -> None:
    def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        Background().run(fail)
