"""`headrace generate` as a user runs it, against a real worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from headrace.client import Client, Result
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

#: Options of every type, and the parameters that they set.
WORDS = (
    "--seed 7 --logprobs 2 --n 2 --max-tokens 12 --min-tokens 3 --temperature 0.8 --top-k 40 --top-p 0.95 --min-p 0.01 "
    "--frequency-penalty 0.5 --presence-penalty 0.25 --repetition-penalty 1.1 --logit-bias 50256=-100 "
    "--logit-bias 11=-2.5 --stop never --stop ever --stop-token-ids 0 --stop-token-ids 1 --echo --ignore-eos "
    "--timeout 60"
)
PARAMS = {
    "seed": 7,
    "logprobs": 2,
    "n": 2,
    "max_tokens": 12,
    "min_tokens": 3,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.25,
    "repetition_penalty": 1.1,
    "logit_bias": {50256: -100, 11: -2.5},
    "stop": ["never", "ever"],
    "stop_token_ids": [0, 1],
    "echo": True,
    "ignore_eos": True,
}


def generate(redis_url: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.worker.cli", "generate", "The old house", *words]
    environment = {**os.environ, "HEADRACE_REDIS_URL": redis_url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def test_all_sampling_options_at_once_give_what_the_client_gets(
    client: Client, worker: WorkerProcess, redis_url: str
) -> None:
    done = generate(redis_url, *WORDS.split(), "--json")
    assert done.returncode == 0, done.stderr
    result = Result.model_validate(json.loads(done.stdout))
    expected = client.submit("The old house", **PARAMS).result(timeout=PATIENCE_S)
    assert result.choices == expected.choices
    assert (result.seed, len(result.choices)) == (7, 2)
    assert all(choice.text.startswith("The old house") and choice.logprobs for choice in result.choices)


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(worker: WorkerProcess, redis_url: str) -> None:
    done = generate(redis_url, "--seed", "-1", "--logprobs", "2", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"seed [1-9]\d+,", done.stderr)
    assert "4 tokens in " in done.stderr
