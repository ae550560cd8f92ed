"""What a merge is asked by, and what it then is.

Must not know: HTTP, leases, how a merge is made.

Shapes: C labels, D width of the features.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from motet.adapters.errors import GateError
from motet.adapters.gates import merge
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion


@dataclass(frozen=True, slots=True)
class Ask:
    """What a merge is made of; equal asks of one pool version give one merge.

    Attributes:
        support: (text, label).
        weights: α given by the caller, or "uniform"; None scores the members on the support.
        seed: of the augmented view; None scores on the examples as they are.
        trim: share of the singular values that merged weights keep; None leaves the weights as they are.
    """

    support: tuple[tuple[str, str], ...]
    top_k: int = merge.DEFAULT_TOP_K
    beta: float = merge.DEFAULT_BETA
    gamma: float = merge.DEFAULT_GAMMA
    seed: int | None = None
    weights: tuple[float, ...] | str | None = None
    trim: float | None = None

    def check(self) -> None:
        """Require what does not depend on the pool.

        Raises:
            GateError: the support is empty, too large, or has too few or too many labels.
        """
        if not 1 <= len(self.support) <= merge.MOST_EXAMPLES:
            raise GateError(
                "support", f"support has {len(self.support)} examples; 1 to {merge.MOST_EXAMPLES} are possible"
            )
        if not 2 <= len(self.labels) <= merge.MOST_LABELS:
            raise GateError("support", f"support has {len(self.labels)} labels; 2 to {merge.MOST_LABELS} are possible")

    def digest(self, version: AdapterVersion) -> str:
        """Of the content: this ask of that pool, and nothing else."""
        content = json.dumps([version.digest, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @property
    def labels(self) -> list[str]:
        """Distinct, in the order of their first example."""
        return list(dict.fromkeys(label for _, label in self.support))


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A merge that can be asked.

    Attributes:
        name: what requests call it.
        alpha: a factor for each member.
        scores: what α was found by; None where it was given.
        prototypes_CD: class means of the support under the merge, trimmed where it is.
        trimmed: what trimming took of the merged weights; None where they are whole.
    """

    name: str
    pool: AdapterVersion
    alpha: tuple[float, ...]
    scores: merge.Merge | None
    labels: tuple[str, ...]
    prototypes_CD: torch.Tensor
    scale: float
    bias: float
    created_s: float
    expires_s: float
    trimmed: Trimmed | None = None
