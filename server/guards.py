"""Who may ask, how much and for how long, as the options say.

Must not know: the command line, how any of it is enforced.
"""

from __future__ import annotations

from collections.abc import Sequence

from motet.server.api.app import RequestLimits
from motet.server.api.keys import KeyLineError, Keys
from motet.server.api.quotas import Quota, Quotas, parse_quota
from motet.server.config import OptionError, ServeConfig, parse_bytes, read_keys


def keys_of(config: ServeConfig) -> Keys:
    """The keys of the files and of the environment.

    Raises:
        OptionError: a file cannot be read, or a line is no key.
    """
    inference = read_keys("api-key-file", config.api_key_file, "MOTET_API_KEY")
    admin = read_keys("admin-key-file", config.admin_key_file, "MOTET_ADMIN_KEY")
    try:
        return Keys(inference, admin)
    except KeyLineError as error:
        raise OptionError(f"--api-key-file or --admin-key-file: {error}") from error


def quotas_of(config: ServeConfig) -> tuple[Quotas, Quotas]:
    """Those of adapters and those of keys.

    Raises:
        OptionError: one is none.
    """
    keys = _quotas("key-quota", config.key_quota)
    if any(quota.weight != 1 for quota in keys.values()):
        raise OptionError("--key-quota: a key has no weight; shares are those of adapters")
    return Quotas("adapter", _quotas("adapter-quota", config.adapter_quota)), Quotas("API key", keys)


def _quotas(option: str, texts: Sequence[str]) -> dict[str, Quota]:
    found: dict[str, Quota] = {}
    for text in texts:
        try:
            name, quota = parse_quota(text)
        except ValueError as error:
            raise OptionError(f"--{option}: {error}") from error
        if name in found:
            raise OptionError(f"--{option} {text!r}: {name!r} has a quota already; give one")
        found[name] = quota
    return found


def limits_of(config: ServeConfig) -> RequestLimits:
    """Of every request.

    Raises:
        OptionError: a limit is impossible.
    """
    body_bytes = parse_bytes("max-body", config.max_body)
    if not body_bytes:
        raise OptionError(f"--max-body {config.max_body!r}: say how many bytes, for example 16MiB")
    for option, value in (("body-timeout", config.body_timeout), ("request-timeout", config.request_timeout)):
        if value is not None and not value > 0:
            raise OptionError(f"--{option} {value:g}: it must be above 0 seconds")
    return RequestLimits(body_bytes, config.body_timeout, config.request_timeout, config.cors_origin)
