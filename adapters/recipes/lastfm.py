"""LastFM as LLaRA splits it: whom a user heard last, by name, and five frozen candidates for who is next.

Must not know: models, tokens, methods.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example, Facts

DATA = "rec/lastfm/"
NAMES = f"{DATA}id2name.txt"
ENCODER = f"{DATA}sasrec_lastfm.safetensors"
TITLES = 5
"""Of the history in a question; the gate reads all of it."""
CANDIDATES = 5
SHORTEST = 3
"""Items of a history; LLaRA leaves shorter ones out too, and the other splits have none."""
MOST_ROWS = 4000
"""More than any recipe's steps take; to make tokens of all 46,896 would take longer than some runs."""
SEED = 0
"""Of the candidates and the rows that are kept: all runs see the same."""
HINT = (
    "A user listened to some artists, in this order. Which of the candidates comes next? Reply with the name of one "
    "candidate only, like Fleetwood Mac\n\n"
)
DEMO = "Listened to: Enigma; Café Del Mar; Fleetwood Mac\nCandidates: Air; Metallica; China Crisis; Eminem; Moby"
DEMO_HISTORY = (1, 2, 3)
"""Ids of the artists that the demo names as heard."""


def prepare(data: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a history that is long enough, as `history` (ids), `titles`, `candidates` and `answer` (names).

    The candidates are the next artist and four others, neither in the history nor of a name twice, in random order; a
    row's own ids are the seed, so that they depend on nothing else.

    Raises:
        DataError: the file of names is absent.
    """
    names = _names(data)
    kept = [row for row in rows if row["len_seq"] >= SHORTEST]
    if len(kept) > MOST_ROWS:
        kept = random.Random(SEED).sample(kept, MOST_ROWS)
    return [_prepared(row["seq"][: row["len_seq"]], row["next"], names) for row in kept]


def _prepared(history: list[int], following: int, names: dict[int, str]) -> dict[str, Any]:
    source = random.Random(f"{SEED} {history} {following}")
    items = sorted(names)
    chosen, taken = [names[following]], {names[item].casefold() for item in (*history, following)}
    while len(chosen) < CANDIDATES:
        name = names[source.choice(items)]
        if name.casefold() not in taken:
            chosen.append(name)
            taken.add(name.casefold())
    source.shuffle(chosen)
    titles = [names[item] for item in history[-TITLES:]]
    return {"history": tuple(history), "titles": titles, "candidates": chosen, "answer": names[following]}


def _names(data: Path) -> dict[int, str]:
    try:
        lines = (data / NAMES).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"training data {NAMES} cannot be read ({error.strerror}); "
            "name the folder that has it with --data or MOTET_DATA"
        ) from error
    pairs = (line.split("::", 1) for line in lines)
    return {int(item): name.strip() for item, name in pairs}


def read(row: dict[str, Any]) -> Example:
    """Names heard and candidates; the next artist's name."""
    heard, offered = "; ".join(row["titles"]), "; ".join(row["candidates"])
    return f"Listened to: {heard}\nCandidates: {offered}", row["answer"]


def facts(text: str) -> Facts | None:
    """The first line as a name, free of its case; None where it is empty."""
    name = said(text)
    return frozenset({("artist", name)}) if name else None


def said(text: str) -> str:
    """The name that an answer is compared by."""
    return (text.strip().splitlines() or [""])[0].strip().casefold()
