"""From a folder to what is served of it: read, lowered, on request approximated; nothing the cache holds twice.

Must not know: what names mean, memory, requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from motet.adapters import methods, source
from motet.adapters.approximate import approximate, digest as lossy_digest
from motet.adapters.base import BaseModel
from motet.adapters.cache import LoweredCache
from motet.adapters.effects import Lowered
from motet.adapters.errors import ShapeError
from motet.adapters.heads import HEAD_CONFIG, HeadFile
from motet.adapters.spec import Declared
from motet.adapters.tokens import OwnTokenizer, own_tokenizer
from motet.adapters.version import Digest


@dataclass(frozen=True, slots=True, eq=False)
class Lowering:
    """What a folder turned out to be.

    Attributes:
        digest: of the files, the declarations and the form that was asked for.
        lowered: what is served.
        exact: what a lossy form stands for, with the digest of its own; None where `lowered` is exact.
        form: the name of the lossy form; "exact" where it is none.
        own: the adapter's tokenizer, where the base's does not know all its tokens.
        head: the output head beside the adapter, as it is in the folder; the cache does not hold it.
    """

    digest: Digest
    lowered: Lowered
    exact: Lowering | None = None
    form: str = "exact"
    own: OwnTokenizer | None = None
    head: HeadFile | None = None


def lower(folder: Path, declared: Declared, base: BaseModel, cache: LoweredCache | None) -> Lowering:
    """Read and check an adapter, and lower it for the base.

    A lossy form is kept in the cache as such; the exact one beside it, which needs no decomposition, is lowered again.

    Raises:
        AdapterError: the adapter is refused.
    """
    files, form = source.read(folder, declared), declared.approximate
    _require_fitting(files.head, base)
    digest = files.digest if form is None else lossy_digest(files.digest, form)
    lowered = cache.get(base.fingerprint, digest) if cache else None
    if lowered is not None and form is None:
        return Lowering(digest, lowered, own=_own(files, lowered, base), head=files.head)
    exact = methods.lower(files, base)
    if lowered is None:
        lowered = exact if form is None else approximate(exact, base, form)
        if cache is not None:
            cache.put(base.fingerprint, digest, lowered)
    own = _own(files, lowered, base)
    if form is None:
        return Lowering(digest, lowered, own=own, head=files.head)
    return Lowering(digest, lowered, Lowering(files.digest, exact, own=own), str(form), own, files.head)


def _require_fitting(head: HeadFile | None, base: BaseModel) -> None:
    if head is not None and head.width != base.feature_width:
        raise ShapeError(
            f"{HEAD_CONFIG}: the head reads features of width {head.width}; those of {base.name!r} have width "
            f"{base.feature_width}: was it trained on another base?"
        )


def _own(files: source.AdapterFiles, lowered: Lowered, base: BaseModel) -> OwnTokenizer | None:
    return None if lowered.vocabulary is None else own_tokenizer(files.tokenizer, base.tokenizers)
