"""Errors of the download folder's file system.

Must not know: what is written there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from motet.adapters.errors import StoreFullError


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Errors of the file system as ours, without any path.

    Raises:
        StoreFullError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise StoreFullError(
            f"the download folder cannot be used: {error.strerror}; --download-dir must name a writable folder with "
            "room"
        ) from error
