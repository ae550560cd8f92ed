"""Counts one completion stream and judges it at its end. Knows events, not how they travel."""

import json

from tests.bench.timeline import Failure, FailureKind


class StreamTally:
    """Token arrivals of one stream.

    A chunk with a choice is a token, even if its text is empty: half a character has none. The exception is an
    empty chunk that says why the stream ends: some servers put the reason in a chunk of its own, others in that of
    a last token without text, and only the usage tells which it was.
    """

    def __init__(self) -> None:
        self.done_s: float | None = None
        self.failure: Failure | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens: int | None = None
        self._times_s: list[float] = []
        self._bare_finish_s: float | None = None

    @property
    def chunk_times_s(self) -> tuple[float, ...]:
        times_s = tuple(self._times_s)
        if self._bare_finish_s is not None and self.output_tokens == len(times_s) + 1:
            return (*times_s, self._bare_finish_s)
        return times_s

    def add(self, data: bytes, now_s: float) -> None:
        """Raises LookupError, TypeError or AttributeError when an event is JSON but not of the documented shape."""
        if data == b"[DONE]":
            self.done_s = now_s
            return
        try:
            event = json.loads(data)
        except ValueError:
            self._fail(FailureKind.PROTOCOL, f"event {data[:80]!r} is not JSON")
            return
        if event.get("error") is not None:
            self._fail(FailureKind.SSE_ERROR, json.dumps(event["error"])[:300])
            return
        choices = event.get("choices")
        if choices:
            choice = choices[0]
            if choice.get("finish_reason") is None or choice.get("text"):
                self._times_s.append(now_s)
            else:
                self._bare_finish_s = now_s
        usage = event.get("usage")
        if usage is not None:
            self.output_tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def verdict(self, expected_tokens: int, allow_merged_chunks: bool) -> Failure | None:
        """Why the stream does not count, or None; to be asked once it has ended."""
        if self.failure is not None:
            return self.failure
        if self.done_s is None:
            return Failure(FailureKind.CLOSED_EARLY, f"stream ended without [DONE] after {len(self._times_s)} chunks")
        if self.output_tokens is None:
            return Failure(FailureKind.NO_USAGE, "no usage came although stream_options asked for it")
        if self.output_tokens != expected_tokens:
            return Failure(FailureKind.WRONG_LENGTH, f"{self.output_tokens} output tokens, {expected_tokens} asked")
        chunks = len(self.chunk_times_s)
        merged_only = allow_merged_chunks and 0 < chunks < self.output_tokens
        if chunks != self.output_tokens and not merged_only:
            return Failure(FailureKind.CHUNK_MISMATCH, f"{chunks} chunks for {self.output_tokens} tokens")
        return None

    def _fail(self, kind: FailureKind, detail: str) -> None:
        if self.failure is None:
            self.failure = Failure(kind, detail)
