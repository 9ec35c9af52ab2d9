"""Completions through litellm."""

from __future__ import annotations

import os

import litellm

asked = {
    "model": "text-completion-openai/demo",
    "api_base": os.environ["SERVER"] + "/v1",
    "api_key": "none",
    "prompt": "Hello.",
    "max_tokens": 10,
    "temperature": 0,
}
whole = litellm.text_completion(**asked)
text = whole.choices[0].text
pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**asked, stream=True)]
assert text and "".join(pieces) == text, (text, pieces)
chat = litellm.completion(
    model="openai/demo",
    api_base=os.environ["SERVER"] + "/v1",
    api_key="none",
    messages=[{"role": "user", "content": "Hello."}],
    max_tokens=5,
)
assert chat.choices[0].message.content
try:
    litellm.text_completion(**{**asked, "max_tokens": -3})
except litellm.exceptions.BadRequestError as error:
    assert "max_tokens" in str(error)
else:
    raise AssertionError("a wrong parameter was accepted")
print(
    f"a completion of {whole.usage.completion_tokens} tokens, the same streamed; a chat; an error that names max_tokens"
)
