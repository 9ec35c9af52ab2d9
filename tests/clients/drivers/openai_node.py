"""The openai package for Node: a completion, a stream, a chat and an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import assert from "node:assert";
import { pathToFileURL } from "node:url";
const { default: OpenAI } = await import(pathToFileURL(process.env.NODE_MODULES + "/openai/index.mjs"));
const client = new OpenAI({ baseURL: process.env.SERVER + "/v1", apiKey: "none" });
const asked = { model: "demo", prompt: "Hello.", max_tokens: 10, temperature: 0 };
const whole = await client.completions.create(asked);
let text = "";
for await (const chunk of await client.completions.create({ ...asked, stream: true }))
  text += chunk.choices[0]?.text ?? "";
assert.ok(text.length > 0);
assert.equal(text, whole.choices[0].text);
const messages = [{ role: "user", content: "Hello." }];
const chat = await client.chat.completions.create({ model: "demo", messages, max_tokens: 5 });
assert.ok(chat.choices[0].message.content);
await assert.rejects(client.completions.create({ ...asked, max_tokens: -3 }), (error) =>
  error instanceof OpenAI.BadRequestError && error.message.includes("max_tokens"));
const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes("demo"));
const count = whole.usage.completion_tokens;
console.log(`a completion of ${count} tokens, the same streamed; a chat; an error; the list of models`);
"""

folder = Path(sys.executable).parents[1]
Path("driver.mjs").write_text(SCRIPT)
subprocess.run(
    ["node", "driver.mjs"], env={**os.environ, "NODE_MODULES": str(folder / "node_modules")}, check=True, timeout=120
)
