"""Every option of `motet serve`: one field per option, with its default and what it means.

Must not know: the command line library, how options are used. The command line, the environment (`MOTET_<OPTION>`) and
the TOML file are all generated from these fields.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motet.adapters.errors import ConfigError
from motet.adapters.spec import Declared, LossyForm

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class OptionError(Exception):
    """An option's value is impossible; the message names option, value and remedy."""


def _option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Options of `motet serve`."""

    model: str | None = _option(None, "Directory or hub id of the base model; without it the default model is used.")
    name: str | None = _option(None, "What requests call the base model; by default the last part of --model.")
    dtype: str = _option("auto", "Type of weights, adapters and cache.", ("auto", "bfloat16", "float16", "float32"))
    device: str = _option("auto", "Where to compute.", ("auto", "cpu", "cuda"))
    native: str = _option("auto", "Whether the compiled CPU backend computes.", ("auto", "on", "off"))
    base_weights: str = _option(
        "exact", "The base's linears as they are, or rounded to int8: faster on a CPU.", ("exact", "int8")
    )
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8000, "Port to listen on.")
    adapter: tuple[str, ...] = _option(
        (),
        "NAME=PATH[,initial=DIR][,residual=DIR][,trained-on-base][,approximate=FORM] of an adapter to load at the "
        "start; repeatable.",
    )
    catalogue: str | None = _option(
        None, "File that keeps published names, versions and the audit trail; without it they end with the process."
    )
    versions_kept: int = _option(5, "Versions of each name that can be rolled back to, the current one included.")
    adapter_root: tuple[str, ...] = _option((), "Folder below which adapters may be loaded at run time; repeatable.")
    adapter_source: tuple[str, ...] = _option(
        (),
        "Beginning of sources that adapters may be loaded from at run time, such as hf://OWNER/, s3://BUCKET/ or "
        "https://HOST/; repeatable.",
    )
    adapter_revisions: str = _option(
        "pinned", "Whether sources may name branches and tags, which change, for commits.", ("pinned", "floating")
    )
    download_dir: str = _option("auto", "Folder of downloaded adapters; auto is motet/downloads in the user's cache.")
    download_size: str = _option("20GiB", "Bytes that folder may take, such as 2GiB.")
    download_timeout: float = _option(600.0, "Seconds that a download may take.")
    autoload: str | None = _option(
        None, "Source of adapters that requests name and nobody has loaded, with {name} in it; without it they are 404."
    )
    autoload_wait: float = _option(60.0, "Seconds that a request waits for such an adapter before it is answered 503.")
    api_key_file: str | None = _option(
        None, "File of inference keys, a line each: KEY [label=NAME] [adapters=PATTERN,...]; without keys it is open."
    )
    admin_key_file: str | None = _option(
        None, "File of admin keys, a line each: KEY [label=NAME]; without one administration is closed."
    )
    adapter_quota: tuple[str, ...] = _option(
        (),
        "NAME=[requests:N][,tokens:N][,weight:W] a minute, of an adapter, the base or * for each other; repeatable.",
    )
    key_quota: tuple[str, ...] = _option(
        (), "LABEL=[requests:N][,tokens:N] a minute, of a key or * for each other; repeatable."
    )
    policy: str = _option("fair", "Whose turn is next: shares of adapters, or by arrival.", ("fair", "fcfs"))
    cors_origin: tuple[str, ...] = _option((), "Origin whose pages may ask from a browser; repeatable.")
    max_body: str = _option("16MiB", "Most bytes of a request's body.")
    body_timeout: float = _option(30.0, "Seconds a request's head may take to arrive, and its body.")
    request_timeout: float | None = _option(
        None, "Seconds a request may take; X-Request-Timeout-S may ask for fewer, and without this for any number."
    )
    adapter_memory: str = _option("auto", "Bytes for resident adapters, such as 2GiB.")
    host_memory: str = _option(
        "auto",
        "Bytes for adapters in the server's own memory, from where they come to the device; auto is 4GiB, but at most "
        "a quarter of the memory there is.",
    )
    adapter_cache: str = _option(
        "auto", "Folder that keeps lowered adapters, or off; auto is motet/lowered in the user's cache."
    )
    adapter_cache_size: str = _option("10GiB", "Bytes that folder may take, such as 2GiB.")
    kv_memory: str = _option("auto", "Bytes for keys and values, such as 2GiB.")
    block_size: int = _option(16, "Positions per cache block.")
    max_batch_rows: int | None = _option(None, "Most rows (tokens) of all requests in one step.")
    max_generations: int | None = _option(None, "Most generations that run at once.")
    max_waiting: int = _option(1024, "Most generations that wait; more requests are answered 429.")
    drain_timeout: float = _option(30.0, "Seconds that running requests may take after SIGTERM.")
    log_level: str = _option("warning", "Detail of the log.", ("debug", "info", "warning", "error"))


def parse_bytes(option: str, text: str) -> int | None:
    """Bytes from "512MiB", "2GiB", "1000000"; None from "auto".

    Raises:
        OptionError: it is none of those.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise OptionError(f"--{option} {text!r} is no size; write for example 512MiB, 2GiB or auto")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_adapter(text: str) -> tuple[str, Path, Declared]:
    """Name, folder and declarations from NAME=PATH[,initial=DIR][,residual=DIR][,trained-on-base][,approximate=FORM].

    Raises:
        OptionError: there is no name or no path, or a part that is none of these.
    """
    name, equals, rest = text.partition("=")
    path, *parts = rest.split(",")
    if not (name and equals and path):
        raise OptionError(f"--adapter {text!r} is not NAME=PATH; write for example sql=adapters/wikisql")
    given: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        possible = part == "trained-on-base" or (key in ("initial", "residual", "approximate") and value)
        if not possible or key in given:
            raise OptionError(
                f"--adapter {text!r}: {part!r} is none of initial=DIR, residual=DIR, approximate=FORM and "
                "trained-on-base, each at most once; a comma cannot be part of a path"
            )
        given[key] = value
    initial, residual = (Path(given[key]).expanduser() if key in given else None for key in ("initial", "residual"))
    try:
        form = LossyForm.parse(given["approximate"]) if "approximate" in given else None
    except ConfigError as error:
        raise OptionError(f"--adapter {text!r}: {error}") from error
    return name, Path(path).expanduser(), Declared(initial, residual, "trained-on-base" in given, form)


def read_keys(option: str, path: str | None, variable: str) -> tuple[str, ...]:
    """Keys from a file, one per line, and from an environment variable.

    Raises:
        OptionError: the file cannot be read or holds no key.
    """
    keys = [os.environ[variable].strip()] if os.environ.get(variable, "").strip() else []
    if path is not None:
        try:
            lines = [line.strip() for line in Path(path).expanduser().read_text().splitlines()]
        except OSError as error:
            raise OptionError(f"--{option} {path!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise OptionError(f"--{option} {path!r} is no UTF-8 text; write one key per line") from error
        found = [line for line in lines if line]
        if not found:
            raise OptionError(f"--{option} {path!r} holds no key; write one per line")
        keys += found
    return tuple(keys)
