"""A registry and its catalogue in a process of their own, which publishes and removes until it is killed.

`python -m tests.e2e.publisher MODEL CATALOGUE SOURCE…` imports everything once. For each line it reads, a seed and a
delay in seconds, it makes such a process, kills it, and answers with what that one had begun and done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from motet.adapters.catalogue import Catalogue
from motet.adapters.condition import NO_TERMS
from motet.adapters.registry import Registry
from tests.support.bases import base_of, residency_of
from tests.support.models import load_dense

NAMES = ("a", "b", "c/d")
KEPT = 3


def live(registry: Registry, sources: dict[str, Path], out: int, seed: int) -> None:
    """Change names for ever."""
    chance = random.Random(seed)

    def say(*words: str) -> None:
        os.write(out, f"{' '.join(words)}\n".encode())

    versions = {named.name: [one.digest for one in named.versions] for named in registry.catalogue.names()}
    served = {info.version.name: info.version.digest for info in registry.published()}
    assert served == {name: digests[0] for name, digests in versions.items()}, registry.standings()
    say("restored", json.dumps(versions))
    while True:
        name, there = chance.choice(NAMES), {info.version.name for info in registry.published()}
        kind = chance.choice(["publish", "publish", "publish", "rollback", "remove"])
        if name not in there:
            kind = "publish"
        kept = [one.digest for one in registry.standing(name).versions] if name in there else []
        if kind == "publish":
            digest = chance.choice(sorted(sources))
            say("begin publish", name, digest)
            registry.load(name, sources[digest], replace=True)
        elif kind == "rollback" and len(kept) > 1:
            digest = chance.choice(kept[1:])
            say("begin publish", name, digest)
            registry.rollback(name, digest, NO_TERMS)
        else:
            say("begin remove", name, "-")
            registry.unload(name)
        say("done")


def main(model: str, file: str, folders: list[str]) -> None:
    torch.set_num_threads(1)  # a process with threads cannot be copied safely
    base = base_of(load_dense(Path(model), torch.float32))
    plain = Registry(base, residency_of(base))
    sources = {str(plain.examine(Path(folder))[1].digest): Path(folder) for folder in folders}
    print(" ".join(sorted(sources)), flush=True)
    for line in sys.stdin:
        seed, delay_s = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                registry = Registry(base, residency_of(base), catalogue=Catalogue(Path(file), base.fingerprint, KEPT))
                registry.restore(lambda name: None)
                live(registry, sources, writing, int(seed))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        time.sleep(float(delay_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading) as said:
            print(said.read(), end="")
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if killed else f"ended by itself: {status}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
