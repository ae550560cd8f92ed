"""When requests are sent. Knows nothing of models, prompts or sockets.

A closed loop keeps a fixed number in flight and needs no clock; an open loop sends at given times whatever
the server does, so a slow server meets a queue.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class ClosedLoop:
    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency {self.concurrency} is less than 1")


@dataclass(frozen=True)
class OpenLoop:
    """Gamma-distributed gaps: cv is their standard deviation over their mean, and cv 1 is a Poisson process."""

    rate_per_s: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.cv <= 0:
            raise ValueError(f"rate {self.rate_per_s} and cv {self.cv} must both be above 0")

    def offsets_s(self, count: int, rng: random.Random) -> list[float]:
        """Send times after the start, ascending.

        Source: S-LoRA's trace generator: gaps ~ Gamma(shape 1/cv², scale cv²/rate).
        """
        shape, scale_s = 1 / self.cv**2, self.cv**2 / self.rate_per_s
        offsets_s, now_s = [], 0.0
        for _ in range(count):
            now_s += rng.gammavariate(shape, scale_s)
            offsets_s.append(now_s)
        return offsets_s


Pacing = ClosedLoop | OpenLoop
