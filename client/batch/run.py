"""A batch: all requests of an input, checked, computed, and written to an output."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from headrace.client.batch.cancel import cancel_rows
from headrace.client.batch.check import Checked, check, read_items
from headrace.client.batch.columns import Columns
from headrace.client.batch.errors import Fault, InvalidBatch, OutputRefused
from headrace.client.batch.formats.readers import READERS
from headrace.client.batch.formats.writers import FLAT, TYPED, Passed
from headrace.client.batch.formats.writers import output_format as output_format_of
from headrace.client.batch.items import BatchItem
from headrace.client.batch.openai import failure_code, join_results
from headrace.client.batch.output import Output
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import ShardSource, Source, open_source
from headrace.client.batch.window import MAX_INFLIGHT, JobService, Notify, Window, warn
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import Outcome, Result
from headrace.client.wire.unicode import printable

#: Progress is reported at least once for this many requests that are answered without a job.
ANSWERS = 256


class DropBatch(Exception):
    """Raise this in `on_progress` to end a batch. Its unfinished jobs are cancelled."""


@dataclass
class BatchReport:
    """The progress of a batch, and in the end its result: numbers of requests.

    `before` counts the requests that the output already had, and `failed_before` the failures among them.
    """

    rows: int = 0
    before: int = 0
    failed_before: int = 0
    succeeded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outstanding: int = 0
    started_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Number of requests that failed in this run."""
        return self.failures.total()

    @property
    def left(self) -> int:
        """Number of requests that are not done."""
        return self.rows - self.before - self.succeeded - self.failed

    def count(self, outcome: Outcome | Exception) -> None:
        """Count a request that is done."""
        if isinstance(outcome, Result):
            self.succeeded += 1
            self.prompt_tokens += outcome.usage.prompt_tokens
            self.completion_tokens += outcome.usage.completion_tokens
        else:
            self.failures[failure_code(outcome)] += 1
        self.seconds = time.monotonic() - self.started_at

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "rows": self.rows,
            "before": self.before,
            "failed_before": self.failed_before,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "failures": dict(self.failures),
            "left": self.left,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
        }


class Batch:
    """A checked input. `run` computes the requests that the output does not have yet.

    Args:
        client: a `Client`; jobs are submitted to it. The attribute may be replaced before `run`.
        source: a path (gzipped or not), a binary file, or an iterable of prompts and mappings. An input that can be
            read only once is copied to a temporary file.
        params: defaults for requests that do not set the parameter.
        text: each line of a file is a prompt.
        limit: process only this many requests.
        models: the models that requests may name; any if not given.
        adapters: the LoRA adapters of models. A request may name one in place of its model.
        answer_mistakes: answer a request with a wrong parameter by the error, and compute the others.
        endpoint: the path that requests of the Batch API name; if not given, the first of them decides.
        skip_invalid: answer every faulty line by its error, also one that is not a request, and compute the others.
        on_line: called with the number of lines read, every 1000 lines.
        format: of the source: jsonl, text, csv, tsv, parquet, arrow, feather, json; by default what its extension says.
        columns: which columns of a table are the prompt, the name and parameters; all others go to the output.
        shard: (i, n) takes every n-th request, from the i-th; results do not depend on it.

    Raises:
        InvalidBatch: requests are wrong; it lists the first ones.
    """

    def __init__(
        self,
        client: JobService,
        source: str | Path | IO[bytes] | Iterable[Any],
        params: Mapping[str, Any] | None = None,
        *,
        text: bool = False,
        limit: int | None = None,
        models: Collection[str] | None = None,
        adapters: Mapping[str, Collection[str]] | None = None,
        answer_mistakes: bool = False,
        endpoint: str | None = None,
        skip_invalid: bool = False,
        on_line: Callable[[int], None] | None = None,
        format: str | None = None,  # noqa: A002 - the name of the option
        columns: Columns | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.client = client
        self._columns = columns or Columns()
        source_format = "text" if text else format
        self._source: Source = open_source(source, source_format, self._columns.check)
        kind = self._source.kind
        self._given, self._limit = source, limit
        self._reader = ItemReader(
            client.model_name,
            params or {},
            text=kind == "text",
            models=models,
            adapters=adapters,
            answers_mistakes=answer_mistakes,
            endpoint=endpoint,
            columns=self._columns if columns or kind in READERS else None,
            skip_invalid=skip_invalid,
        )
        if not 0 <= shard[0] < shard[1]:
            raise InvalidRequest("shard", f"{shard[0]}/{shard[1]}", "I/N with 0 <= I < N, for example 0/3")
        if shard[1] > 1:
            self._source = ShardSource(self._source, *shard)
        self.checked: Checked = check(
            self._source, self._reader, client.submitter.prepare_together, limit=limit, on_line=on_line
        )

    def _passed(self, formats: set[str]) -> Passed:
        """The columns of the input that flat rows of outputs in these formats have. Raises InvalidBatch."""
        if formats.isdisjoint(FLAT):
            return {}
        if self.checked.not_flat is not None:
            line, name = self.checked.not_flat
            message = f"{name}: a flat row has one text and no log probabilities, and this request asks for more; "
            message += "expected an output in JSON lines, for example -o results.jsonl"
            raise InvalidBatch([Fault(line, name, message, self._source.place(line))])
        schema = self._source.schema
        if schema is None:
            return self.checked.seen.types(one_type=not formats.isdisjoint(TYPED))
        used = self._columns.used(schema)
        return {name: kind for name, kind in schema.items() if name not in used}

    def rows(self) -> Iterator[BatchItem]:
        """The requests, read again from the input."""
        return read_items(self._source, self._reader, limit=self._limit, repeated=self.checked.repeated)

    def run(
        self,
        output: str | Path,
        *,
        errors: str | Path | None = None,
        output_format: str | None = None,
        resume: bool = False,
        retry_errors: bool = False,
        overwrite: bool = False,
        max_inflight: int = MAX_INFLIGHT,
        ordered: bool = False,
        cancel: bool = False,
        notify: Notify = warn,
        on_progress: Callable[[BatchReport], None] = lambda _: None,
    ) -> BatchReport:
        """Compute the requests and write each when it is done.

        Args:
            output: a path, a URL that fsspec opens, or `-` for standard output.
            errors: a file for failures; they go to `output` if not given.
            output_format: openai, flat, csv, tsv, parquet or arrow; by default what the extension of `output` says.
            resume: compute only what an existing output does not have.
            retry_errors: like `resume`, and compute failed requests again.
            overwrite: compute everything, and replace an existing output.
            max_inflight: how many jobs may be queued or running.
            ordered: write in the order of the input, not as jobs end.
            cancel: with `resume`: compute nothing, and cancel what a stopped run of this output left in the queue.
                `outstanding` of the report is the number of these jobs.
            notify: called with a line of text for the user.
            on_progress: called at least every half second. It may raise `DropBatch`.

        Raises:
            OutputRefused: the output is the input, is in use, or exists and neither `resume` nor `overwrite` is set.
            InvalidBatch: the output has other requests under the same custom ids, or a format for which results have
                too much.
            InputChanged: the input has changed since it was checked.
        """
        report = BatchReport(rows=self.checked.rows)
        passed = self._passed({output_format_of(output, output_format), output_format_of(errors or output, None)})
        with Output(output, errors, form=output_format, passed=passed) as sink:
            sink.check_free(self._given, resume=resume or retry_errors, overwrite=overwrite)
            done = bytearray() if overwrite else self._done(sink, retry_errors)
            report.before, report.failed_before = sum(map(int.bit_count, done)), sink.failed_before
            missing = (row for row in self.rows() if not _is_set(done, row.line))
            if cancel:
                run = sink.run
                self.client.reader.status()  # raises, before anything has changed, if Redis does not answer
                sink.renew()  # first: if this process ends now, the jobs are computed for nothing, but no row fails
                report.outstanding = cancel_rows(self.client.reader, missing, run)
                return report
            sink.open(overwrite=overwrite)

            def answer(row: BatchItem, error: InvalidRequest) -> None:
                sink.write([(row, error)])
                report.count(error)
                if report.failed % ANSWERS == 0:
                    on_progress(report)

            jobs = self._jobs(missing, sink.run, answer)
            joined = JoinedRows()

            def tick() -> None:
                report.outstanding = window.outstanding
                on_progress(report)

            window: Window[RowPart] = Window(self.client, size=max_inflight, ordered=ordered, notify=notify, tick=tick)
            on_progress(report)
            try:
                for parts in window.run(jobs):
                    pairs = joined.add(parts, sink.run)
                    sink.write(pairs)
                    for _, outcome in pairs:
                        report.count(outcome)
                    report.outstanding = window.outstanding
                    on_progress(report)
            except DropBatch:
                window.drop()
                raise
            sink.finish()
        return report

    def _jobs(
        self, rows: Iterable[BatchItem], run: str, answer: Callable[[BatchItem, InvalidRequest], None]
    ) -> Iterator[tuple[RowPart, PreparedJob]]:
        """The jobs of the requests. `answer` gets those that are answered by their mistakes."""
        for row in rows:
            try:
                if row.mistake is not None:
                    raise row.mistake
                yield from list(prepare_parts(self.client, row, run))  # all jobs of a request, or none
            except InvalidRequest as error:
                if not self._reader.answers(error):
                    raise
                answer(row, error)

    def _done(self, sink: Output, retry_errors: bool) -> bytearray:
        """One bit for each line of the input: whether its request is in the output."""
        done = bytearray(self.checked.lines // 8 + 1)
        found = 0

        def scanned() -> Iterator[tuple[str, str]]:
            nonlocal found
            for each in sink.scan(retry_errors=retry_errors):
                found += 1
                yield each.custom_id, each.digest

        written = scanned()
        for line, agrees in self.checked.index.matches(written):
            if not agrees:
                message = "the output has this custom_id with another request, model or parameters; "
                advice = "compute everything again (--overwrite) or write to another file"
                raise InvalidBatch([Fault(line, "custom_id", message + advice)])
            done[line // 8] |= 1 << line % 8
        if found and not any(done):
            message = (
                f"{printable(str(sink.path))} belongs to another run: the input has none of its {found} requests; "
            )
            raise OutputRefused(f"{message}write to another file, or compute everything again (--overwrite)")
        return done


class RowPart(NamedTuple):
    """One of the jobs of a request: the one for the prompt `number` of `prompts`."""

    row: BatchItem
    number: int
    prompts: int


def prepare_parts(client: JobService, row: BatchItem, run: str) -> Iterator[tuple[RowPart, PreparedJob]]:
    """The jobs of a request: one, or one for each prompt."""
    requests, job_id = [dict(fields) for fields in row.requests()], row.job_id(run)
    for number, fields in enumerate(requests):
        fields["id"] = job_id if row.prompts is None else f"{job_id}.{number}"
    for number, job in enumerate(client.submitter.prepare_all(requests)):
        yield RowPart(row, number, len(requests)), job


class JoinedRows:
    """Joins the outcomes of the jobs of each request. In memory are only requests of which some jobs are done."""

    def __init__(self) -> None:
        self._done: dict[int, dict[int, Outcome | Exception]] = {}  # by line, by index of the prompt

    def add(
        self, parts: Iterable[tuple[RowPart, Outcome | Exception]], run: str
    ) -> list[tuple[BatchItem, Outcome | Exception]]:
        """Add outcomes of jobs. Returns the requests whose last job is among them, in that order."""
        complete = []
        for (row, number, prompts), outcome in parts:
            if prompts == 1:
                complete.append((row, outcome))
                continue
            done = self._done.setdefault(row.line, {})
            done[number] = outcome
            if len(done) == prompts:
                del self._done[row.line]
                complete.append((row, _join([done[i] for i in range(prompts)], row.job_id(run))))
        return complete


def _join(outcomes: list[Outcome | Exception], job_id: str) -> Outcome | Exception:
    """The outcome of a request: all results, or the failure of the first prompt that failed."""
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    if len(results) < len(outcomes):
        return next(outcome for outcome in outcomes if not isinstance(outcome, Result))
    return join_results(results).model_copy(update={"id": job_id})


def _is_set(bits: bytearray, line: int) -> bool:
    return line // 8 < len(bits) and bool(bits[line // 8] >> line % 8 & 1)
