"""What `headrace batch` shows."""

from __future__ import annotations

import io
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from headrace.client import InvalidRequest
from headrace.client.batch.items import BatchItem
from headrace.client.batch.run import BatchReport
from headrace.config import Settings
from headrace.worker.cli.batch_estimate import Estimate, _count
from headrace.worker.cli.batch_input import read_params
from headrace.worker.cli.batch_progress import ProgressDisplay
from headrace.worker.cli.batch_report import resume_command, stopped, summary


def report() -> BatchReport:
    return BatchReport(
        rows=100,
        before=40,
        failed_before=3,
        succeeded=20,
        failures=Counter(context_length_exceeded=4, cancelled=1),
        prompt_tokens=500,
        completion_tokens=1000,
        seconds=10,
        outstanding=9,
    )


def test_the_last_table_has_rows_failures_and_rates() -> None:
    lines = summary(report(), "out.jsonl", None).splitlines()
    assert lines[:5] == [
        "==========",
        "Rows: 20 computed, 5 failed, 40 were in the output before (3 of them failures); 100 in the input",
        "Failed: 4 context_length_exceeded, 1 cancelled; see out.jsonl, compute them again with --retry-errors",
        "Prompt: 500 tokens, 50.000 tokens-per-sec",
        "Generation: 1000 tokens, 100.000 tokens-per-sec",
    ]
    assert lines[5] == "Time: 10.0 s"
    assert re.fullmatch(r"Peak memory: \d+\.\d{3} GB, of the client", lines[6])


def test_without_a_terminal_progress_is_a_line_from_time_to_time() -> None:
    now = [1000.0]
    written = io.StringIO()
    display = ProgressDisplay(Console(file=written, width=200), clock=lambda: now[0])
    early = report()
    early.succeeded, early.completion_tokens = 0, 0
    with display.shown():
        display.update(early)
        now[0] += 20
        display.update(report())
        display.update(report())
        display.notify("Redis [is] away")
    lines = written.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("65/100 rows  4 context_length_exceeded  1 cancelled  50 tokens/s, ends in 35.0 s at ")
    assert lines[1] == "Redis [is] away"


def test_on_a_terminal_it_is_a_bar() -> None:
    written = io.StringIO()
    display = ProgressDisplay(Console(file=written, force_terminal=True, width=150))
    with display.shown():
        display.checked(2000)
        display.update(report())
    assert "65/100 rows" in written.getvalue()


def test_ctrl_c_is_answered_with_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["headrace", "batch", "-i", "my file", "-o", "o", "--overwrite"])
    assert resume_command() == "headrace batch -i 'my file' -o o --resume"
    said = stopped(report(), local=False)
    assert "65 of 100 rows are done, 9 jobs stay in the queue and will be computed" in said
    assert "9 jobs will be computed again" in stopped(report(), local=True)


def test_parameters_are_json_or_text() -> None:
    assert read_params(("max_tokens=5", "stop=a=b", "stop_token_ids=[1,2]", "echo=true")) == {
        "max_tokens": 5,
        "stop": "a=b",
        "stop_token_ids": [1, 2],
        "echo": True,
    }
    for wrong in ("max_tokens", "=5"):
        with pytest.raises(InvalidRequest, match="NAME=VALUE"):
            read_params((wrong,))


def test_an_estimate_counts_what_the_model_can_read() -> None:
    found = Estimate()
    assert found.count([10], {"max_tokens": 5, "n": 3}, 16, None)
    assert found.count([10], {"max_tokens": 6}, 16, None)
    assert not found.count([10], {"max_tokens": 7}, 16, None)
    assert found.count([0], {}, 16, None)  # 16 new ones, as without max_tokens
    assert (found.rows, found.prompt_tokens, found.longest_prompt, found.most_new_tokens) == (4, 30, 10, 15 + 6 + 16)
    assert found.too_long == 1
    assert found.count([10], {}, 16, 9)  # generation_config.json says 9, of which 6 fit
    assert found.count([10], {}, 16, 4)
    assert (found.most_new_tokens, found.too_long) == (37 + 6 + 4, 1)


def test_a_dry_run_counts_the_tokens_that_the_worker_would_read() -> None:
    def counted(**fields: Any) -> Estimate:
        row = BatchItem(1, "row-1", {"priority": "bulk", "seed": 1, **fields}, "digest")
        batch: Any = SimpleNamespace(rows=lambda: iter([row]))
        return _count(batch, Settings(model="demo"))[0]

    assert counted(prompt="<|endoftext|>", parse_special_tokens=True).prompt_tokens == 1
    assert counted(prompt="<|endoftext|>").prompt_tokens > 1
    assert counted(prompt="").prompt_tokens == 1
    chat = counted(messages=[{"role": "user", "content": "Hello."}])  # the model has no chat template
    assert (chat.rows, chat.not_readable, chat.prompt_tokens) == (1, 1, 0)
