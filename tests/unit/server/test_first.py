"""What is asked of the start is looked at before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.adapters.spec import NOTHING_DECLARED
from motet.server.config import OptionError, ServeConfig
from motet.server.first import require_possible


def test_a_name_is_given_once() -> None:
    adapters = [(name, Path(name), NOTHING_DECLARED) for name in ("a", "b", "a")]
    require_possible(ServeConfig(), adapters[:2])
    with pytest.raises(OptionError, match="--adapter names 'a' twice"):
        require_possible(ServeConfig(), adapters)


def test_the_current_version_is_kept() -> None:
    require_possible(ServeConfig(versions_kept=1), [])
    with pytest.raises(OptionError, match="--versions-kept 0"):
        require_possible(ServeConfig(versions_kept=0), [])
