"""Options of sources that are impossible end the start, each by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motet.server.config import OptionError, ServeConfig
from motet.server.sourcing import open_sources


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_source": ("https://",)}, r"--adapter-source: 'https://' is no beginning"),
        ({"adapter_source": ("file:///etc/",)}, r"--adapter-source: 'file:///etc/' is no beginning"),
        ({"download_size": "much"}, "--download-size 'much' is no size"),
        ({"download_timeout": 0.0}, "--download-timeout 0 is no time"),
        ({"download_timeout": float("nan")}, "--download-timeout nan is no time"),
        ({"autoload": "s3://bucket/"}, r"has \{name\} not once"),
        ({"autoload": "s3://bucket/{name}"}, "--autoload .* none of the places"),
        ({"autoload": "hf://org/{name}", "adapter_source": ("hf://org/",)}, "--autoload .* is not pinned"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_sources(ServeConfig(**options))


def test_downloads_lie_where_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for options in ({}, {"download_dir": str(tmp_path / "own")}):
        store = open_sources(ServeConfig(**options)).store
        assert store.folder == tmp_path / ("own" if options else "motet/downloads")


def test_an_autoload_template_that_is_allowed() -> None:
    config = ServeConfig(autoload="hf://org/{name}@main", adapter_source=("hf://org/",), adapter_revisions="floating")
    template = open_sources(config).autoload
    assert template is not None
    assert template.source("fr") == "hf://org/fr@main"
