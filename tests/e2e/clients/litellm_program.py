"""Asks the server at argv[1] through LiteLLM's two providers; prints what is left of its answers as JSON."""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network on import
import litellm

PROVIDERS = ("openai", "hosted_vllm")


def ask(provider: str, **options: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/dense",
        api_base=f"{sys.argv[1]}/v1",
        api_key="none",
        messages=[{"role": "user", "content": "the quick brown fox"}],
        max_tokens=4,
        temperature=0,
        extra_body={"uncertainty": True},
        num_retries=0,
        **options,
    )


said: dict[str, Any] = {}
for provider in PROVIDERS:
    whole = ask(provider)
    chunks = [chunk.model_dump() for chunk in ask(provider, logprobs=True, stream=True)]
    said[provider] = {
        "choice": whole.choices[0].model_dump(),
        "with logprobs": ask(provider, logprobs=True).choices[0].model_dump(),
        "header": whole._hidden_params["additional_headers"]["llm_provider-x-uncertainty-score"],
        "streamed": chunks[-1]["choices"][0],
    }
decision = litellm.decisions(
    model="openai/judge",
    api_base=f"{sys.argv[1]}/v1",
    api_key="none",
    input="the quick brown fox",
    questions=[{"type": "predicate", "instructions": "It is."}],
)
said["decision"] = decision.model_dump() if hasattr(decision, "model_dump") else decision
print(json.dumps(said, default=str))
