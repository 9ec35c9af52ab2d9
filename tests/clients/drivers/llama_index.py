"""Completions through llama-index."""

from __future__ import annotations

import os

from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(model="demo", api_base=os.environ["SERVER"] + "/v1", api_key="none", max_tokens=10, temperature=0)
text = model.complete("Hello.").text
pieces = [piece.delta or "" for piece in model.stream_complete("Hello.")]
assert text and "".join(pieces) == text, (text, pieces)
print("a completion, and the same streamed")
