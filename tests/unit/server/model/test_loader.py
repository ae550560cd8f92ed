"""What loading leaves behind."""

from __future__ import annotations

import gc
import weakref

from tests.support.harness import Harness
from tests.support.models import tiny_llama


def test_a_model_that_is_gone_frees_its_cache() -> None:
    harness = Harness(tiny_llama())
    assert harness.run([([1, 2, 3], None)])[0].tokens
    cache = weakref.ref(harness.loaded.attention.cache)
    del harness
    gc.collect()
    assert cache() is None
