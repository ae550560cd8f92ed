"""Puts together what adapters come from, out of the options.

Must not know: the base model, the engine, HTTP.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.catalogue import Catalogue
from motet.adapters.errors import ForbiddenSourceError, InvalidSourceError
from motet.adapters.sources.resolve import Sources
from motet.adapters.sources.store import Store
from motet.server.api.autoload import Template
from motet.server.config import OptionError, ServeConfig, parse_bytes

TALKATIVE = (
    *("httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub", "urllib3", "requests", "fsspec"),
    *("s3fs", "aiobotocore", "botocore", "boto3", "gcsfs", "google", "aiohttp"),
)
"""Loggers of libraries that write down addresses with signatures, or headers with credentials."""
DOWNLOAD_BYTES = 20 << 30
"""--download-size auto."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenSources:
    """Where adapters come from.

    Attributes:
        store: where downloads are kept.
        autoload: the source of adapters that requests name and nobody has loaded.
    """

    all: Sources
    store: Store
    autoload: Template | None

    def keep_what_is_in(self, catalogue: Catalogue) -> None:
        """Never remove a download that is served, or that can be rolled back to."""
        self.store.used = lambda: self.all.kept(
            version.origin for named in catalogue.names() for version in named.versions
        )


def open_sources(config: ServeConfig) -> OpenSources:
    """Of the options.

    Raises:
        OptionError: an option's value is none.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    size = parse_bytes("download-size", config.download_size)
    folder = user_cache("downloads") if config.download_dir == "auto" else Path(config.download_dir).expanduser()
    store = Store(folder, DOWNLOAD_BYTES if size is None else size)
    roots = [Path(root).expanduser() for root in config.adapter_root]
    if not config.download_timeout > 0:
        raise OptionError(f"--download-timeout {config.download_timeout:g} is no time; give seconds above 0")
    try:
        sources = Sources(
            roots,
            config.adapter_source,
            store,
            floating=config.adapter_revisions == "floating",
            timeout_s=config.download_timeout,
        )
    except InvalidSourceError as error:
        raise OptionError(f"--adapter-source: {error}") from error
    return OpenSources(sources, store, _template(config, sources))


def _template(config: ServeConfig, sources: Sources) -> Template | None:
    if config.autoload is None:
        return None
    if config.autoload.count("{name}") != 1:
        raise OptionError(
            f"--autoload {config.autoload!r} has {{name}} not once; write for example s3://bucket/{{name}}"
        )
    template = Template(config.autoload)
    try:
        sources.require_allowed(template.source("name"))
    except (InvalidSourceError, ForbiddenSourceError) as error:
        raise OptionError(f"--autoload {config.autoload!r}: {error}") from error
    return template


def user_cache(name: str) -> Path:
    """A folder of ours in the user's cache."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    user = configured if os.path.isabs(configured) else os.path.expanduser("~/.cache")
    return Path(user) / "motet" / name
