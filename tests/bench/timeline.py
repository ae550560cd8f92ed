"""What happened to one request, and the times that follow from it. Knows nothing of how it was sent.

All times are seconds of one monotonic clock.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class FailureKind(StrEnum):
    CONNECTION = "connection"
    HTTP_STATUS = "http_status"
    PROTOCOL = "protocol"
    SSE_ERROR = "sse_error"
    CLOSED_EARLY = "closed_early"
    NO_USAGE = "no_usage"
    WRONG_LENGTH = "wrong_length"
    CHUNK_MISMATCH = "chunk_mismatch"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    detail: str


@dataclass(frozen=True)
class Timeline:
    """One request from the moment it was due to the end of its stream.

    Args:
        due_s: when it should have been sent. Latencies count from here, not from `sent_s`: a client that falls
            behind must not make the server look fast.
        chunk_times_s: arrival of each chunk that carried a token.
        output_tokens: as the server's usage counts them.
    """

    model: str
    due_s: float
    sent_s: float
    done_s: float
    chunk_times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    failure: Failure | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.chunk_times_s[0] - self.due_s if self.chunk_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if self.output_tokens < 2 or not self.chunk_times_s:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Every gap between chunks: what a reader of the stream waits."""
        return [after - before for before, after in pairwise(self.chunk_times_s)]

    @property
    def e2e_s(self) -> float:
        """Whole latency, to the end of the stream."""
        return self.done_s - self.due_s
