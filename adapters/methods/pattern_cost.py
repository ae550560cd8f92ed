"""Makes sure that a configuration's regular expressions come to an end on the base's modules.

Must not know: what the patterns choose. `re` backtracks without bound and holds the interpreter's lock meanwhile, so
that one pattern like (a+)+$ would stop the whole server; it is tried in a process of its own first, whose processor
time is limited. What ends there ends here: it is the same matching of the same names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from motet.adapters.errors import ConfigError
from motet.adapters.methods.config_values import LONGEST_PATTERN, NUMBERED_LAYER, PATH_ENDING

MOST_CPU_S = 0.5
MOST_WALL_S = 60
"""The processor time is what counts; this ends a process that gets none."""
MEMORY_BYTES = 1 << 30
_COSTLY = frozenset("*+?{|(")
"""A pattern without any of these takes one pass."""
_PROGRAM = f"""
import json, re, resource, signal, sys
signal.setitimer(signal.ITIMER_VIRTUAL, {MOST_CPU_S})
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
patterns, modules = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        continue
    for module in modules:
        compiled.match(module)
        compiled.fullmatch(module)
"""


def require_bounded(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Try the patterns of an adapter_config.json on the names.

    Raises:
        ConfigError: they take more than MOST_CPU_S.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, list(modules)]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MOST_WALL_S,
        ).returncode
    except subprocess.TimeoutExpired:
        ended = None
    if ended != 0:
        raise ConfigError(
            f"the regular expressions of adapter_config.json take more than {MOST_CPU_S} s on the names of the base's "
            "modules; write names instead, or patterns without repetitions of alternatives or of repetitions"
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """Each pattern that may be costly, as PEFT matches it; what is no pattern at all is refused elsewhere."""
    layers, ranks, alphas = (config.get(key) for key in ("layers_pattern", "rank_pattern", "alpha_pattern"))
    whole = [config.get(key) for key in ("target_modules", "exclude_modules")]
    numbered = layers if isinstance(layers, list) else [layers]
    endings = [key for table in (ranks, alphas) if isinstance(table, dict) for key in table]
    for around, found in (("{}", whole), (NUMBERED_LAYER, numbered), (PATH_ENDING, endings)):
        for pattern in found:
            if isinstance(pattern, str) and len(pattern) <= LONGEST_PATTERN and _COSTLY & set(pattern):
                yield around.format(pattern)
