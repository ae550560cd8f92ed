"""Runs a plan of images: one forward for all of them and all adapters.

Must not know: queues, requests, HTTP, methods. An image is a prompt of one position, and ends with its first token,
which says nothing; what was asked for is beside it.

Shapes: N images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from motet.server.engine.types import Plan, Span, SpanResult
from motet.server.model.batch import EffectsBuilder
from motet.server.model.vision import LoadedVision

DONE = 0
"""The token that every image is answered with."""


class VisionRunner:
    """See `motet.server.engine.types.Runner`.

    Note: used by the step thread only.
    """

    def __init__(self, loaded: LoadedVision, effects: EffectsBuilder) -> None:
        self._loaded, self._effects = loaded, effects

    @torch.inference_mode()
    def run(self, plan: Plan) -> Sequence[SpanResult]:
        """One forward for all images of the plan; results in the order of its spans."""
        loaded, spans = self._loaded, plan.spans
        pixels_NCHW = torch.stack([one.values for span in spans for one in span.given.values()])
        assert len(pixels_NCHW) == plan.rows, "every position is an image"
        loaded.step.effects = self._effects.build(spans).body
        loaded.position_step.overlays = self._effects.position_overlays(spans)
        if loaded.position_step.overlays is not None:
            loaded.overlaid.install()
        feature_ND, logits_NC = loaded.forward(pixels_NCHW)
        feature_ND = feature_ND.to("cpu", torch.float32)
        logits: Sequence[torch.Tensor | None] = [None] * len(spans)
        if logits_NC is not None:
            logits = list(logits_NC.to("cpu", torch.float32))
        return [_result(*one) for one in zip(spans, feature_ND, logits, strict=True)]


def _result(span: Span, feature_D: torch.Tensor, logits_C: torch.Tensor | None) -> SpanResult:
    if not all(bool(values.isfinite().all()) for values in (feature_D, logits_C) if values is not None):
        model = f"adapter {span.adapters!r}" if span.adapters else "the base model"
        return SpanResult(None, error=f"{model} computed NaN or infinity for this image; its weights overflow")
    return SpanResult(DONE, feature=feature_D, class_logits=logits_C)
