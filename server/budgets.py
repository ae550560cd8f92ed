"""How much memory each tier may take, as the options say, or by default.

Must not know: what lies in it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from motet.adapters.cache import LoweredCache
from motet.adapters.host import HOST_BYTES
from motet.server.config import ServeConfig, parse_bytes
from motet.server.sourcing import user_cache

CPU_MEMORY_BYTES = 1 << 30
"""Default of --kv-memory and --adapter-memory on a CPU; committed by the operating system as it is first used."""
CUDA_SHARES = {"kv-memory": 0.6, "adapter-memory": 0.15}
"""Default shares of the free device memory after the base model is loaded."""
HOST_SHARE = 0.25
"""Of the machine's memory or its container's, at most HOST_BYTES: default of --host-memory."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
CACHE_BYTES = 10 << 30
"""Default of --adapter-cache-size."""


def adapter_cache(config: ServeConfig) -> LoweredCache | None:
    """The disk tier; None where the options turn it off."""
    size = parse_bytes("adapter-cache-size", config.adapter_cache_size)
    if config.adapter_cache == "off":
        return None
    folder = user_cache("lowered") if config.adapter_cache == "auto" else Path(config.adapter_cache)
    return LoweredCache(folder.expanduser(), CACHE_BYTES if size is None else size)


def device_budget(text: str, option: str, device: torch.device) -> int:
    """Bytes that an option gives, or its default on the device."""
    given = parse_bytes(option, text)
    if given is not None:
        return given
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARES[option])
    return CPU_MEMORY_BYTES


def host_budget(config: ServeConfig, limit: Path = CONTAINER_LIMIT) -> int:
    """Bytes of the host tier.

    Args:
        limit: file with the bytes that the container may take, or "max"; there is none outside of one.
    """
    given = parse_bytes("host-memory", config.host_memory)
    if given is not None:
        return given
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        whole = min(whole, int(limit.read_text()))
    return min(HOST_BYTES, int(whole * HOST_SHARE))
