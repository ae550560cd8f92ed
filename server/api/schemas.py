"""Request bodies of the OpenAI endpoints. What is not here is a 400, and so is what cannot be honoured.

Must not know: the engine, tokens, which adapters there are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from motet.adapters.gates.merge import DEFAULT_BETA, DEFAULT_GAMMA, DEFAULT_TOP_K, MOST_EXAMPLES

Text = Annotated[str, StringConstraints(min_length=0)]
"""Text that has a UTF-8 form: the constraint makes pydantic look, and refuse half of a surrogate pair."""
TokenIds = list[Annotated[int, Field(ge=0)]]
MOST_STOPS = 16
MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_BETA = 1e6
"""Cosines that differ by a millionth are then e to one apart; more would only overflow."""
MOST_SEED = 1 << 63
"""What random generators take."""
MOST_EXPIRES_S = 7 * 24 * 3600
MOST_PER_MINUTE = 1e12
MOST_WEIGHT = 1e6
MOST_SAMPLES = 100_000
"""Draws of a Monte Carlo answer: its probabilities are then off by about 0.001."""


class Body(BaseModel):
    """Base of every request body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(Body):
    """`response_format`: only plain text is honoured."""

    type: Literal["text"]


class GateBody(Body):
    """`gate`: what the adapter's rank gate is computed from; exactly one of the first three.

    `history` and `candidates` are item ids, in the order of the prompt's markers where it has some.
    """

    history: list[int] | None = None
    user_embedding: list[float] | None = None
    weights: list[float] | None = None
    candidates: list[int] | None = None


class PartBody(Body):
    """One adapter of a mixture."""

    name: str = Field(min_length=1)
    weight: float


class ImageBody(Body):
    """An image, as a data URL."""

    image: Annotated[str, StringConstraints(min_length=1)]


class ExampleBody(Body):
    """One example of a support set: a text, or an image as a data URL."""

    text: Annotated[str, StringConstraints(min_length=1)] | None = None
    image: Annotated[str, StringConstraints(min_length=1)] | None = None
    label: Annotated[str, StringConstraints(min_length=1, max_length=256)]


class MergeBody(Body):
    """How a pool is merged: by a support set, or by weights; `expires_s` seconds long a merge is remembered at least.

    The support is needed in both cases: the merge classifies by it. `trim` is the share of singular values kept.
    """

    support: list[ExampleBody] = Field(min_length=2, max_length=MOST_EXAMPLES)
    top_k: int = Field(default=DEFAULT_TOP_K, ge=1)
    beta: float = Field(default=DEFAULT_BETA, ge=0, le=MOST_BETA)
    gamma: float = Field(default=DEFAULT_GAMMA, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=MOST_SEED)
    weights: list[float] | Literal["uniform"] | None = None
    trim: float | None = Field(default=None, gt=0, le=1)
    expires_s: int = Field(default=3600, ge=1, le=MOST_EXPIRES_S)


class UncertaintyBody(Body):
    """`uncertainty`: `samples` 0 is exact; `auto` is the adapter's head where it has one, else the logits."""

    method: Literal["auto", "logprob", "vbll", "softmax"] = "auto"
    level: list[Literal["sequence", "token"]] = Field(default=["sequence"], min_length=1, max_length=2)
    samples: int = Field(default=0, ge=0, le=MOST_SAMPLES)
    on_unsupported: Literal["error", "omit"] = "error"


class ClassifyBody(Body):
    """POST /v1/classify; `seed` is that of the samples."""

    model: str = Field(min_length=1)
    input: Text | ImageBody | list[Text | ImageBody]
    uncertainty: bool | UncertaintyBody | None = None
    seed: int | None = None


class GenerationBody(Body):
    """What completions and chat completions share.

    Fields that name the caller or tune bookkeeping (`user`, `metadata`, `store`, …) are accepted and have no effect on
    the answer.
    """

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Text | list[Text] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    gate: GateBody | None = None
    merge: MergeBody | None = None
    adapters: list[PartBody] | None = Field(default=None, min_length=1)
    merge_method: Literal["linear", "ties", "dare_ties"] = "linear"
    density: float | None = None
    merge_seed: int | None = Field(default=None, ge=0, lt=MOST_SEED)
    uncertainty: bool | UncertaintyBody | None = None
    user: str | None = None
    request_id: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | list[Text] | TokenIds | list[TokenIds]
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)
    suffix: Literal[""] | None = None
    add_special_tokens: bool = True


class ContentPart(Body):
    """One part of a message's content: only text is honoured."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One chat message; which roles and orders are possible is the chat template's matter."""

    role: Text
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None


class QuotaBody(Body):
    """`quota` of an adapter; what is absent is not limited, and a weight is 1."""

    requests_per_minute: float | None = Field(default=None, gt=0, le=MOST_PER_MINUTE)
    tokens_per_minute: float | None = Field(default=None, gt=0, le=MOST_PER_MINUTE)
    weight: float | None = Field(default=None, gt=0, le=MOST_WEIGHT)


class PublishBody(Body):
    """PUT /v1/adapters/{name}; `sha256` is the digest that the source must have.

    `initial_path` to `approximate` declare what the source does not say. Without `pin` or `quota` the name keeps its
    own. `preload` brings the version to the device before a request needs it there.
    """

    source: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    initial_path: str | None = Field(default=None, min_length=1)
    residual_path: str | None = Field(default=None, min_length=1)
    trained_on_base: bool = False
    approximate: str | None = None
    pin: bool | None = None
    preload: bool = False
    quota: QuotaBody | None = None


class RollbackBody(Body):
    """POST /v1/adapters/{name}/rollback; `version` is a kept digest or its first digits, by default the one before."""

    version: str | None = Field(default=None, pattern="^[0-9a-f]{12,64}$")


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter; `initial_path` to `trained_on_base` declare what the folder does not say."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    initial_path: str | None = Field(default=None, min_length=1)
    residual_path: str | None = Field(default=None, min_length=1)
    trained_on_base: bool = False
    approximate: str | None = None


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
