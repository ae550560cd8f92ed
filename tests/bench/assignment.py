"""Which model each request names. Knows nothing of time or of what a model is."""

import random
from collections.abc import Sequence
from enum import StrEnum


class Assignment(StrEnum):
    """How models are spread over requests.

    The first four are Punica's shapes; `power` is S-LoRA's: index = floor(x·N), x with density α·x^(α-1).
    """

    UNIFORM = "uniform"
    ZIPF = "zipf"
    DISTINCT = "distinct"
    IDENTICAL = "identical"
    ROUND_ROBIN = "round-robin"
    POWER = "power"


def zipf_weights(count: int, alpha: float) -> list[float]:
    """Unnormalised popularity of models 1…count: rank^-alpha, the first the most popular."""
    return [rank**-alpha for rank in range(1, count + 1)]


def assign(models: Sequence[str], count: int, how: Assignment, alpha: float, rng: random.Random) -> list[str]:
    """One model per request.

    Args:
        alpha: exponent of `zipf` and `power`, ignored by the others.

    Raises:
        ValueError: no models, or fewer models than requests under `distinct`.
    """
    if not models:
        raise ValueError("no models to send requests to; name some with --models")
    match how:
        case Assignment.UNIFORM:
            return rng.choices(models, k=count)
        case Assignment.ZIPF:
            return rng.choices(models, weights=zipf_weights(len(models), alpha), k=count)
        case Assignment.POWER:
            # random() is below 1, yet its root may round up to 1.0 for a large alpha
            last = len(models) - 1
            return [models[min(last, int(len(models) * rng.random() ** (1 / alpha)))] for _ in range(count)]
        case Assignment.IDENTICAL:
            return [models[0]] * count
        case Assignment.ROUND_ROBIN:
            return [models[i % len(models)] for i in range(count)]
        case Assignment.DISTINCT:
            if count > len(models):
                raise ValueError(
                    f"{count} requests over {len(models)} models cannot all be distinct; "
                    "send fewer requests or use --assignment round-robin"
                )
            return list(models[:count])
