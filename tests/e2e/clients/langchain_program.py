"""Asks the server at argv[1] through LangChain; prints what is left of its answers as JSON."""

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI

PROMPT = "the quick brown fox"
ASKED = {"uncertainty": {"level": ["sequence", "token"]}}


def chat(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{sys.argv[1]}/v1",
        api_key="none",
        model="dense",
        max_completion_tokens=4,
        temperature=0,
        max_retries=0,
        extra_body=ASKED,
        **options,
    )


whole = chat(logprobs=True, include_response_headers=True).invoke(PROMPT).response_metadata
plain = chat().invoke(PROMPT).response_metadata
streamed = None
for chunk in chat(logprobs=True).stream(PROMPT):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed is not None
said = {
    "whole": whole["logprobs"],
    "header": whole["headers"]["x-uncertainty-score"],
    "plain": plain,
    "streamed": streamed.response_metadata["logprobs"],
}
print(json.dumps(said, default=str))
