"""Runs directories of the zoo through client, queue and worker, all at once, and compares with transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from headrace.client import Client, HeadraceError, Job
from headrace.client.wire.activations import CHECKPOINTS
from headrace.config import load_settings
from headrace.model.trusted_files import ModelError
from headrace.worker.cli import main
from headrace.worker.engine.build import build_engine
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, worker_on
from tests.patience import PATIENCE_S
from tests.zoo.entry import Entry, Made
from tests.zoo.reference import Answer, answers, quiet
from tests.zoo.texts import compare_texts

LOGITS = CHECKPOINTS[8].tolerance


@dataclass
class Row:
    """What was found for one directory."""

    entry: Entry
    prompts: int = 0
    tokens: int = 0
    #: The smallest difference of the two largest logits, over all compared tokens.
    gap: float = float("inf")
    #: The largest difference of a logit or of a token's log probability.
    largest: float = 0.0
    #: Texts that were read and written by the tokenizer alone.
    texts: int = 0
    faults: list[str] = field(default_factory=list)

    def expect(self, what: str, expected: Any, got: Any) -> None:
        if expected != got:
            self.faults.append(f"{what}: expected {_short(expected)}, got {_short(got)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else text[:297] + "..."


@dataclass
class Animal:
    """A directory that was built, its answers, and its row."""

    row: Row
    made: Made
    answers: list[Answer] = field(default_factory=list)


def run(entries: Sequence[Entry], root: Path, every: int = 1) -> list[Row]:
    """Build the directories under `root`, compare each with its reference, and return the rows of the table.

    Of the 3,000 texts that each tokenizer reads and writes, only one of `every` is tried.
    """
    animals = [_build(entry, root) for entry in entries]
    served = [animal for animal in animals if not animal.row.entry.refused and _loads(animal, every)]
    for animal in served:
        animal.answers = answers(animal.row.entry, animal.made)
    if served:
        with EmbeddedRedis.ephemeral() as server, _worker(server, served, root), Client(redis_url=server.url) as client:
            _compare(client, served)
    for animal in animals:
        if animal.row.entry.refused:
            _refuse(animal)
    return [animal.row for animal in animals]


def _build(entry: Entry, root: Path) -> Animal:
    folder = root / entry.name
    folder.mkdir()
    with quiet():
        built = entry.build(folder)
    made = built if isinstance(built, Made) else Made(folder)
    row = Row(entry)
    if made.source is not None:
        done = CliRunner().invoke(main, ["convert", str(made.source), str(made.model)])
        if done.exit_code:
            row.faults.append(f"headrace convert ended with {done.exit_code}: {done.output[-300:]}")
    return Animal(row, made)


def _loads(animal: Animal, every: int) -> bool:
    """Whether it loads as a worker loads it. What is said then, and its tokenizer, are compared too."""
    if animal.row.faults:
        return False
    try:
        engine = build_engine(load_settings(model=f"{animal.row.entry.name}={animal.made.model}", threads=1))
    except (ModelError, ValueError) as error:
        animal.row.faults.append(f"it does not load: {error}")
        return False
    except Exception as error:
        animal.row.faults.append(f"loading fails: {error!r}")
        return False
    notes = (*getattr(engine.runner.model, "notes", ()), *getattr(engine.tokenizer, "notes", ()))
    for said in animal.row.entry.said:
        if not any(re.search(said, note) for note in notes):
            animal.row.faults.append(f"nothing said of {said}: {notes}")
    if not animal.row.entry.text_refused:
        made = animal.made
        animal.row.texts, faults = compare_texts(
            engine.tokenizer, made.reference or made.model, animal.row.entry, every
        )
        animal.row.faults += faults
    return True


def _refuse(animal: Animal) -> None:
    """Loading as a worker loads must fail with the sentence of the table."""
    settings = load_settings(model=f"{animal.row.entry.name}={animal.made.model}", threads=1)
    try:
        build_engine(settings)
    except ModelError as error:
        if not re.search(animal.row.entry.refused, str(error)):
            animal.row.faults.append(f"refused with other words than {animal.row.entry.refused!r}: {error}")
    except Exception as error:
        animal.row.faults.append(f"not refused by name: {error!r}")
    else:
        animal.row.faults.append("it loads")


@contextmanager
def _worker(server: EmbeddedRedis, served: Sequence[Animal], root: Path) -> Iterator[WorkerProcess]:
    models = ",".join(f"{animal.row.entry.name}={animal.made.model}" for animal in served)
    settings = {"HEADRACE_MODEL": models, "HEADRACE_SLOTS": "8", "HEADRACE_LEASE_S": "20"}
    with worker_on(server, root / "worker.log", **settings) as worker:
        worker.wait_ready()
        yield worker


def _compare(client: Client, served: Sequence[Animal]) -> None:
    """Queue all jobs of all directories together, and beside them jobs that sample."""
    asked: list[tuple[Animal, Answer, str]] = []
    requests: list[dict[str, Any]] = []
    for animal in served:
        for answer in animal.answers:
            for kind, request in _requests(animal, answer).items():
                asked.append((animal, answer, kind))
                requests.append(request)
    try:
        jobs: list[Job | HeadraceError] = list(client.submit_many(requests))
    except HeadraceError:  # one of them is refused at once: find which
        jobs = [_submitted(client, request) for request in requests]
    for (animal, answer, kind), job in zip(asked, jobs, strict=True):
        what = f"{kind} of {answer.prompt!r}"
        try:
            if isinstance(job, HeadraceError):
                raise job
            result = job.result(PATIENCE_S)
            if kind == "prompt ids":
                animal.row.expect(what, answer.ids, result.choices[0].token_ids)
            elif kind == "output":
                _judge(animal.row, answer, result.choices[0], job.checkpoints()["logits"])
        except HeadraceError as error:
            animal.row.faults.append(f"{what}: {error}")
    for animal in served:
        _finish(client, animal)


def _submitted(client: Client, request: dict[str, Any]) -> Job | HeadraceError:
    try:
        return client.submit(**request)
    except HeadraceError as error:
        return error


def _requests(animal: Animal, answer: Answer) -> dict[str, dict[str, Any]]:
    entry = animal.row.entry
    prompt = {"messages": list(answer.prompt)} if isinstance(answer.prompt, tuple) else {"prompt": answer.prompt}
    count = len(answer.tokens) + answer.ended  # if it did not stop, it would write one more
    common = {**prompt, "model": entry.name, **entry.request}
    found = {"output": {**common, "max_tokens": max(count, 1), "temperature": 0, "logprobs": 0, "checkpoints": [8]}}
    if "prompt" in prompt:
        found["prompt ids"] = {**common, "max_tokens": 0, "echo": True}
    beside = {**common, "max_tokens": max(count, 1), "temperature": 1.0, "seed": 3, "n": 2, "ignore_eos": True}
    return {**found, "a job beside it": beside}


def _judge(row: Row, answer: Answer, choice: Any, logits: np.ndarray) -> None:
    what = f"of {answer.prompt!r}"
    row.prompts += 1
    row.gap = min(row.gap, answer.gap)
    if answer.logits is not None:
        if answer.logits.shape != logits.shape:
            row.expect(f"shape of the logits {what}", answer.logits.shape, logits.shape)
            return
        difference = float(np.abs(answer.logits - logits).max())
        row.largest = max(row.largest, difference)
        if not difference <= LOGITS:
            row.faults.append(f"logits {what}: off by {difference:.2g}")
    if not answer.tokens:  # the first token is a near tie
        return
    row.tokens += len(answer.tokens)
    row.expect(f"tokens {what}", answer.tokens, choice.token_ids)
    row.expect(f"end {what}", "stop" if answer.ended else "length", choice.finish_reason)
    row.expect(f"text {what}", answer.text, choice.text)
    for theirs, ours in zip(answer.logprobs, choice.logprobs or [], strict=False):
        row.largest = max(row.largest, abs(theirs - ours.logprob))
        if not abs(theirs - ours.logprob) <= 2 * LOGITS:
            row.faults.append(f"log probabilities {what}: expected {theirs}, got {ours.logprob}")
            break


def _finish(client: Client, animal: Animal) -> None:
    """What one directory must show over all its prompts."""
    entry, row = animal.row.entry, animal.row
    if entry.stops and not any(answer.ended for answer in animal.answers):
        row.faults.append("no prompt of the reference ends by an end-of-text token")
    if entry.text_refused:
        try:
            client.submit("Hello.", model=entry.name, max_tokens=2).result(PATIENCE_S)
            row.faults.append("a prompt of text is not refused")
        except HeadraceError as error:
            if not re.search(entry.text_refused, str(error)):
                row.faults.append(f"text refused with other words than {entry.text_refused!r}: {error}")
