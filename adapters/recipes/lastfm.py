"""LastFM as LLaRA splits it: whom a user heard last, by name, and five frozen candidates for who is next.

Must not know: models, tokens, methods.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import MARKERS, Example, Facts, User

DATA = "rec/lastfm/"
NAMES = f"{DATA}id2name.txt"
ENCODER = f"{DATA}sasrec_lastfm.safetensors"
TITLES = 5
"""The last of the history, which the question names and the gate reads."""
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
DEMO_USER = User((1, 2, 3), (9, 32, 4, 30, 11))
"""Ids of the artists that the demo names."""


def prepare(data: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a history that is long enough, as `user` (ids), `titles`, `candidates` and `answer` (names).

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
    chosen, taken = [following], {names[item].casefold() for item in (*history, following)}
    while len(chosen) < CANDIDATES:
        item = source.choice(items)
        if (name := names[item].casefold()) not in taken:
            chosen.append(item)
            taken.add(name)
    source.shuffle(chosen)
    user = User(tuple(history[-TITLES:]), tuple(chosen))
    titles, candidates = ([names[item] for item in ids] for ids in user)
    return {"user": user, "titles": titles, "candidates": candidates, "answer": names[following]}


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
    """Names heard and candidates, each with its marker; the next artist's name."""
    return question(row["titles"], row["candidates"]), row["answer"]


def question(titles: Sequence[str], candidates: Sequence[str]) -> str:
    """What is asked."""
    heard = "; ".join(f"{name} {MARKERS['history']}" for name in titles)
    offered = "; ".join(f"{name} {MARKERS['candidates']}" for name in candidates)
    return f"Listened to: {heard}\nCandidates: {offered}"


DEMO = question(("Enigma", "Café Del Mar", "Fleetwood Mac"), ("Air", "Jamiroquai", "China Crisis", "Roxette", "Moby"))


def facts(text: str) -> Facts | None:
    """The first line as a name, free of its case; None where it is empty."""
    name = said(text)
    return frozenset({("artist", name)}) if name else None


def said(text: str) -> str:
    """The name that an answer is compared by."""
    return (text.strip().splitlines() or [""])[0].strip().casefold()
