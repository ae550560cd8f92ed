"""The same answers by Monte Carlo, as the vbll package defines them: for comparison, and for those who ask for it.

Must not know: heads, features, files. With S seeded draws z_s of the logits:

    P = mean_s softmax(z_s)      aleatoric = mean_s H(softmax(z_s))

The error of a probability is about 0.3 / √S; `predictive.exact` has none.

Source: vbll 0.4.9, `DiscClassification.predictive`; the split of the entropy is that of `predictive`.
"""

from __future__ import annotations

import torch

from motet.server.heads.predictive import Logits, Predictive, check, softmax

MOST_CELLS = 1 << 20
"""Values that are drawn at a time: 8 MB."""


def monte_carlo(logits: Logits, samples: int, seed: int) -> Predictive:
    """The answer to one request; the same seed gives the same answer, whatever else is asked.

    Args:
        samples: S, at least 1.

    Raises:
        HeadError: logits are not finite, or a variance is negative.
    """
    assert samples >= 1
    check(logits)
    if logits.variance_C is None:
        return softmax(logits.mean_C)
    generator = torch.Generator().manual_seed(seed)
    mean_C = logits.mean_C.detach().cpu().double()
    deviation_C = logits.variance_C.detach().cpu().double().sqrt()
    p_C, entropy = torch.zeros_like(mean_C), 0.0
    size = max(1, MOST_CELLS // len(mean_C))
    for start in range(0, samples, size):
        shape = min(size, samples - start), len(mean_C)
        epsilon_SC = torch.randn(shape, generator=generator, dtype=torch.float64)
        p_SC = (mean_C + deviation_C * epsilon_SC).softmax(-1)
        p_C += p_SC.sum(0)
        entropy += float(torch.special.entr(p_SC).sum())
    return Predictive.of(p_C / samples, entropy / samples)
