"""Calibrates a head on labelled examples: one half chooses the temperature, the other the threshold, and is scored.

Must not know: files, where logits come from, how results are shown. The halves are drawn by a seed. The scores are
honest of the temperature, which has not seen the second half; the share abstained from is of the very examples that
chose the threshold. Shapes: N examples, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from motet.server.heads.calibration import LARGEST_TEMPERATURE, conformal_threshold, fit_temperature
from motet.server.heads.errors import HeadError
from motet.server.heads.predictive import Logits, exact
from motet.server.heads.scores import Reliability, accuracy, brier, nll, reliability, true

LEAST_EXAMPLES = 50
"""Of both halves. Of 25 answers that are 90 % sure, an accuracy is known to a standard error of 6 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """How good the answers to one half are, with one temperature."""

    temperature: float
    reliability: Reliability
    nll: float
    brier: float
    accuracy: float

    @classmethod
    def of(cls, temperature: float, p_NC: torch.Tensor, y_N: torch.Tensor) -> Scored:
        """The scores of answers that were computed with this temperature."""
        return cls(temperature, reliability(p_NC, y_N), nll(p_NC, y_N), brier(p_NC, y_N), accuracy(p_NC, y_N))

    @property
    def ece(self) -> float:
        """Expected calibration error in 15 bins."""
        return self.reliability.error


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """What was found.

    Attributes:
        fitted: examples that chose the temperature.
        scored: the others, which chose the threshold and which the scores are of.
        before, after: with the head's temperature until now, and with the new one.
        abstained: share of the second half whose 1 - max p is above the threshold.
        kept_accuracy: of the rest; None where nothing is left.
    """

    fitted: int
    scored: int
    before: Scored
    after: Scored
    miss_rate: float
    threshold: float
    abstained: float
    kept_accuracy: float | None


def require_enough(examples: int, miss_rate: float) -> None:
    """Refuse too few examples before anything is computed.

    Raises:
        HeadError: there are fewer than anything can be said of, or than the miss rate needs.
    """
    # The second half must hold ⌈(n + 1)(1 - miss_rate)⌉ ≤ n, which is n ≥ 1 / miss_rate - 1.
    needed = max(LEAST_EXAMPLES, 2 * math.ceil(1 / miss_rate - 1 - 1e-9))
    if examples < needed:
        raise HeadError(
            f"there are {examples} labelled rows; a miss rate of {miss_rate:g} needs at least {needed}: give more rows"
            + (", or allow a larger rate" if needed > LEAST_EXAMPLES else "")
        )


def halves(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the examples that choose the temperature, and of the others; the second half is the larger."""
    order_N = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return order_N[: examples // 2], order_N[examples // 2 :]


def calibrate(
    logits: Sequence[Logits], y_N: torch.Tensor, temperature: float, miss_rate: float, seed: int
) -> Calibrated:
    """Fit and score.

    Args:
        logits: of every example, without any temperature.
        y_N: the true labels.
        temperature: until now.
        miss_rate: in (0, 1); see `conformal_threshold`.
        seed: of the halves.

    Raises:
        HeadError: there are too few examples, logits are not finite, or no temperature fits.
    """
    require_enough(len(logits), miss_rate)
    fit_M, held_M = halves(len(logits), seed)
    found = fit_temperature([logits[index] for index in fit_M.tolist()], y_N[fit_M])
    if abs(math.log(found)) > math.log(LARGEST_TEMPERATURE) - 0.01:
        why = "nearly all are answered right" if found < 1 else "the answers have nothing to do with the labels"
        raise HeadError(
            f"no temperature from 1/{LARGEST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} fits {len(fit_M)} rows: "
            f"{why}; give more rows, of the kind that is served"
        )
    held, y_M = [logits[index] for index in held_M.tolist()], y_N[held_M]

    def answers(t: float) -> torch.Tensor:
        return torch.stack([answer.p_C for answer in exact([each.tempered(t) for each in held])])

    after_MC = answers(found)
    threshold = conformal_threshold(true(after_MC, y_M), miss_rate)
    kept_M = 1 - after_MC.max(-1).values <= threshold
    return Calibrated(
        fitted=len(fit_M),
        scored=len(held),
        before=Scored.of(temperature, answers(temperature), y_M),
        after=Scored.of(found, after_MC, y_M),
        miss_rate=miss_rate,
        threshold=threshold,
        abstained=1 - float(kept_M.double().mean()),
        kept_accuracy=accuracy(after_MC[kept_M], y_M[kept_M]) if kept_M.any() else None,
    )
