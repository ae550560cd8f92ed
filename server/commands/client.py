"""Calls a running server.

Must not know: what is asked for, what is done with the answers.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import httpx

if TYPE_CHECKING:
    from motet.adapters.effects import Lowered

TIMEOUT_S = 600


def call(
    method: str,
    url: str,
    path: str,
    key_variable: str,
    body: dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Call the server; its errors become ours."""
    key = os.environ.get(key_variable, "").strip() or os.environ.get("MOTET_ADMIN_KEY", "").strip()
    headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
    try:
        response = httpx.request(method, url.rstrip("/") + path, headers=headers, json=body, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise click.ClickException(f"no answer from {url}: {error}; is the server running, is --url right?") from error
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text
        raise click.ClickException(f"{response.status_code}: {message}")
    return response


def address_of(name: str) -> str:
    """Of an adapter."""
    return f"/v1/adapters/{urllib.parse.quote(name, safe='/:@+')}"


def base_of(url: str) -> dict[str, Any]:
    """The server's base model as adapters see it."""
    base: dict[str, Any] = call("GET", url, "/v1/base", "MOTET_ADMIN_KEY").json()
    return base


def lowered_of(url: str, name: str) -> tuple[str, Lowered]:
    """Version (name@digest) and effects of a published adapter.

    Raises:
        CorruptSourceError: what came is not what the server sent.
    """
    from motet.adapters.lowered_file import parse

    response = call("GET", url, f"{address_of(name)}/lowered", "MOTET_ADMIN_KEY")
    return response.headers["X-Motet-Adapter"], parse(response.content)
