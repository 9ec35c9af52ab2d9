"""`headrace batch --dry-run`: count the tokens of a batch, and estimate its time from a sample of its rows."""

from __future__ import annotations

import json
import random
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import click

from headrace.client import Client, SamplingParams
from headrace.client.batch.items import BatchItem
from headrace.client.batch.run import Batch, BatchReport, JoinedRows, RowPart, prepare_parts
from headrace.client.batch.window import Window
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import WIRE_NAMES, GenerateRequest, parse_request
from headrace.config import Settings
from headrace.worker.cli.backends import Backends
from headrace.worker.cli.batch_input import BatchInput
from headrace.worker.cli.batch_progress import ProgressDisplay
from headrace.worker.cli.batch_report import duration, peak_memory
from headrace.worker.cli.local_stack import check_worker_packages, note, settings_for

#: Rows that are computed to measure the rate, and how many of them warm up the workers before.
SAMPLE, WARM_UP = 128, 8


@dataclass
class Estimate:
    """The size of a batch: its tokens, counted, and its time, estimated from the rate of a sample of rows."""

    rows: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    #: New tokens if no row stops before its max_tokens.
    most_new_tokens: int = 0
    #: Rows that exceed the context length of the model: they would fail.
    too_long: int = 0
    #: Rows that would fail for another reason, such as a chat for a model without a chat template.
    not_readable: int = 0
    rows_measured: int = 0
    tokens_per_s: float = 0.0
    seconds: float = 0.0

    def count(self, tokens: list[int], fields: dict[str, Any], max_context: int, default: int | None) -> bool:
        """Add a row, whose prompts have so many tokens. Returns whether the model can compute it.

        Args:
            tokens: of each prompt of the row.
            fields: of the row.
            max_context: limit of prompt and new tokens together.
            default: new tokens by the model's generation_config.json, if it decides; at most what fits.
        """
        most = max(1, max_context - max(tokens))
        usual = SamplingParams.model_fields["max_tokens"].default if default is None else min(default, most)
        new = fields.get("max_tokens", 0 if "continuation" in fields else usual)
        fits = bool(max(tokens) + new <= max_context)
        self.rows += 1
        self.prompt_tokens += sum(tokens)
        self.longest_prompt = max(self.longest_prompt, *tokens)
        self.most_new_tokens += new * fields.get("n", 1) * len(tokens) if fits else 0
        self.too_long += not fits
        return fits

    def as_text(self) -> str:
        """The lines of the table at the end."""
        lines = [
            f"Rows: {self.rows}, of which {self.too_long} are longer than the model reads and would fail",
            f"Prompt: {self.prompt_tokens} tokens, the longest {self.longest_prompt}",
            f"Generation: at most {self.most_new_tokens} tokens",
            f"Time: about {duration(self.seconds)}, from {self.rows_measured} rows at {self.tokens_per_s:.0f} tokens/s",
            *([f"Not readable: {self.not_readable} rows would fail"] if self.not_readable else []),
            f"Peak memory: {peak_memory() / 1e9:.3f} GB, of the client",
        ]
        return "\n".join(["=" * 10, *lines])


def estimate(backends: Backends, given: BatchInput, *, max_inflight: int, as_json: bool) -> None:
    """Check the input, count its tokens, compute a sample of its rows, and print the estimate for all of them.

    Raises:
        HeadraceError, SettingsError, EmbeddedRedisError, ModelError: the estimate cannot be made.
    """
    check_worker_packages()  # the tokenizer is one of them
    settings = settings_for(given.model)
    batch = given.check(backends, settings, ProgressDisplay(note))
    found, sample = _count(batch, settings)
    if sample:
        with backends.find_or_start_stack(settings) as stack:
            _measure(stack.client, sample[:WARM_UP], max_inflight)
            report = _measure(stack.client, sample, max_inflight)
        found.rows_measured = report.succeeded + report.failed
        found.tokens_per_s = report.completion_tokens / report.seconds
        found.seconds = report.seconds * (found.rows - found.too_long - found.not_readable) / found.rows_measured
    if as_json:
        click.echo(json.dumps({**asdict(found), "peak_memory_bytes": peak_memory()}))
    else:
        click.echo(found.as_text())


def _count(batch: Batch, settings: Settings) -> tuple[Estimate, list[BatchItem]]:
    """The counts of all rows, and a random sample of the rows that the model can compute."""
    from headrace.model.generation_config import read_ends, sampling_defaults
    from headrace.model.gguf_file import raw_config
    from headrace.model.hub import config_path, find_model
    from headrace.model.tokenizer import load_tokenizer
    from headrace.model.weights import read_config
    from headrace.worker.engine.requests import read_prompt

    source = settings.models[settings.model_name]
    tokenizer = load_tokenizer(source, allow_shared=settings.allow_shared_model)
    folder = find_model(source)
    config = read_config(config_path(folder))
    ends = read_ends(folder, raw_config(config_path(folder)), tokenizer, config.vocab_size)
    defaults = sampling_defaults(folder) if settings.generation_config == "auto" else {}
    longest = int(defaults["max_tokens"]) if "max_tokens" in defaults else None
    max_context = min(settings.max_context or config.n_positions, config.n_positions)
    found, sample, dice = Estimate(), list[BatchItem](), random.Random(1)  # noqa: S311
    for row in batch.rows():
        try:
            tokens = [
                len(read_prompt(_readable(fields), tokenizer, ends, settings.parse_special_tokens)[0])
                for fields in row.requests()
            ]
        except JobFailed:
            found.rows += 1
            found.not_readable += 1
            continue
        if not found.count(tokens, row.fields, max_context, longest):
            continue
        if len(sample) < SAMPLE:
            sample.append(row)
        elif (place := dice.randrange(found.rows)) < SAMPLE:
            sample[place] = row
    return found, sample


def _readable(fields: dict[str, Any]) -> GenerateRequest:
    """The request of a row without what only the client reads."""
    return parse_request({name: value for name, value in fields.items() if name in WIRE_NAMES})


def _measure(client: Client, sample: list[BatchItem], max_inflight: int) -> BatchReport:
    """Compute rows and drop their results."""
    report, run = BatchReport(rows=len(sample)), secrets.token_hex(6)
    jobs = (part for row in sample for part in prepare_parts(client, row, run))
    joined = JoinedRows()
    for parts in Window[RowPart](client, size=max_inflight).run(jobs):
        for _, outcome in joined.add(parts, run):
            report.count(outcome)
    return report
