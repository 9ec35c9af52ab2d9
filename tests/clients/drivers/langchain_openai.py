"""Completions through langchain-openai."""

from __future__ import annotations

import os

from langchain_openai import OpenAI

model = OpenAI(model="demo", base_url=os.environ["SERVER"] + "/v1", api_key="none", max_tokens=10, temperature=0)
text = model.invoke("Hello.")
assert text and model.batch(["Hello."] * 5) == [text] * 5
assert "".join(model.stream("Hello.")) == text
print("invoke, a batch of five and a stream give the same text")
