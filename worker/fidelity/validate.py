"""`headrace validate`: jobs through client, queue and worker, their tensors beside those of other implementations."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headrace.client import Client
from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import Row, compare
from headrace.client.wire.errors import HeadraceError
from headrace.config import Settings
from headrace.config.extras import how_to_install
from headrace.model.hub import ModelError, find_model
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.model.weights import check_weights, read_config
from headrace.worker.fidelity import report as checkpoints
from headrace.worker.fidelity.diagnosis import likely_cause
from headrace.worker.fidelity.references import REFERENCES, Reference, ReferenceUnavailable, load_reference
from headrace.worker.fidelity.references.files import read_weights
from headrace.worker.fidelity.report import Loss

#: The usual prompts: text, the empty prompt, one token, and (below) one that fills the context.
PROMPTS = ("Hello.", "The quick brown", "Once upon a time", "", "The")
NEW_TOKENS = 10
#: What other precisions than float32 cost is measured on text: H. G. Wells, The Time Machine (1895), its beginning.
PASSAGE = (
    "The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us. "
    "His pale grey eyes shone and twinkled, and his usually pale face was flushed and animated. The fire burnt "
    "brightly, and the soft radiance of the incandescent lights in the lilies of silver caught the bubbles that "
    "flashed and passed in our glasses. Our chairs, being his patents, embraced and caressed us rather than "
    "submitted to be sat upon, and there was that luxurious after-dinner atmosphere, when thought runs gracefully "
    "free of the trammels of precision."
)
#: Logits of a prompt this long are 200 MB: they are looked at in the shorter ones.
LOGITS_LIMIT = 256
#: Company for the jobs that are looked at, so that they are computed in a batch.
COMPANY = ("It was a dark night, and", "She said that", "London", "The river ran past the old house on the hill " * 8)


class ValidationError(HeadraceError):
    """Raised when there is nothing to compare with, or it cannot be read; the message says what to do."""


@dataclass
class Case:
    """One prompt, and what our worker made of it."""

    tokens: list[int]
    new_tokens: int
    numbers: list[int]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The thirteen rows against one reference."""

    model: str
    dtype: str
    reference: str
    fingerprint: str
    prompts: int
    rows: list[Row]
    cause: str = ""
    note: str = ""
    #: Of other precisions than float32.
    loss: Loss | None = None

    @property
    def ok(self) -> bool:
        """Whether all that was compared holds, and something was."""
        return all(row.ok is not False for row in self.rows) and any(row.ok for row in self.rows if 0 < row.number < 12)


class Validation:
    """A comparison of one model with several references.

    Raises:
        ValidationError: the model cannot be read; a reference is unknown, or none is installed.
    """

    def __init__(self, settings: Settings, references: Sequence[str], prompts: Sequence[str]) -> None:
        self.settings = settings
        self.model = settings.models[settings.model_name]
        try:
            self.folder = find_model(self.model)
            self.config = read_config(self.folder / "config.json")
            check_weights(self.folder, self.config)
            self.tokenizer: Tokenizer = load_tokenizer(self.model)
        except ModelError as error:
            raise ValidationError(str(error)) from error
        self.skipped: list[str] = []
        self._references, self._files = self._load(references)
        self.cases = self._cases(prompts)
        self._traces: dict[str, list[dict[str, np.ndarray]]] = {}

    def _load(self, names: Sequence[str]) -> tuple[list[Reference], dict[str, dict[str, np.ndarray]]]:
        libraries, files = [], {}
        for name in names or REFERENCES:
            try:
                if name in REFERENCES:
                    libraries.append(load_reference(name, self.folder))
                else:
                    files[name] = checkpoints.read_tensors(Path(name))
            except ReferenceUnavailable as error:
                if names:
                    raise ValidationError(str(error)) from error
                self.skipped.append(str(error))
            except ValueError as error:
                hint = f"a reference is one of {', '.join(REFERENCES)}, or a file of tensors"
                raise ValidationError(f"{error}; {hint}") from error
        if not libraries and not files:
            raise ValidationError(f"no reference is installed: {how_to_install('references')}")
        return libraries, files

    def _cases(self, prompts: Sequence[str]) -> list[Case]:
        limit, ends = self.config.n_positions, self.tokenizer.end_of_text
        cases = []
        usual = PROMPTS if self.settings.dtype == "float32" else (*PROMPTS, PASSAGE)
        for prompt in prompts or usual:
            tokens = self.tokenizer.encode(prompt) or ([] if ends is None else [ends])
            if self._fits(tokens):
                cases.append(Case(tokens, NEW_TOKENS, sorted(CHECKPOINTS)))
        if not prompts:
            full = [(7919 * i) % self.tokenizer.vocab_size for i in range(limit - 1)]
            numbers = [n for n in CHECKPOINTS if n != 8 or limit <= LOGITS_LIMIT]
            cases.append(Case(full, 1, numbers))
        if not cases:
            raise ValidationError(f"the prompts leave no room for {NEW_TOKENS} tokens in {limit} positions")
        return cases

    def run(self, client: Client, progress: Callable[[str], None] = lambda _: None) -> list[Report]:
        """Submit everything at once, and compare; `progress` is told what is being done.

        Raises JobFailed and the like if a job fails.
        """
        self._progress = progress
        common = {"temperature": 0, "ignore_eos": True}
        company = [{"prompt": text, "max_tokens": 40, **common} for text in COMPANY if self.config.n_positions >= 256]
        wanted = [
            {"prompt": c.tokens, "max_tokens": c.new_tokens, "checkpoints": c.numbers, **common} for c in self.cases
        ]
        self._progress(f"computing {len(self.cases)} prompts here")
        jobs = client.submit_many([*company, *wanted])[len(company) :]
        for case, job in zip(self.cases, jobs, strict=True):
            result = job.result(timeout=600)
            case.tensors = job.checkpoints()
        ready = self._ready_row(client)
        return [
            *(self._against_library(reference, ready, result.fingerprint) for reference in self._references),
            *(self._against_file(name, found, ready, result.fingerprint) for name, found in self._files.items()),
            *self._among_references(),
        ]

    def _ready_row(self, client: Client) -> Row:
        ready = client.status().serves(self.settings.model_name)
        return Row(0, CHECKPOINTS[0][0], f"{len(self.cases)} jobs through client, queue and worker", ok=ready)

    def _against_library(self, reference: Reference, ready: Row, fingerprint: str) -> Report:
        theirs = []
        for i, case in enumerate(self.cases):
            count = f"prompt {i + 1} of {len(self.cases)}, {len(case.tokens)} tokens"
            self._progress(f"computing with {reference.name}: {count}")
            theirs.append(self._trace(reference, case))
        self._traces[reference.name] = theirs
        tolerances = self._tolerances(reference, theirs)
        tables = [
            compare(case.tensors, tensors, reference=reference.name, tolerances=tolerances)
            for case, tensors in zip(self.cases, theirs, strict=True)
        ]
        if self.settings.dtype != "float32":
            tables = [self._forgive_near_ties(t, th, tolerances) for t, th in zip(tables, theirs, strict=True)]
        rows = [ready, *checkpoints.table(tables)]
        report = self._report(reference.name, fingerprint, rows, self._cause(tables, theirs))
        if self.settings.dtype == "float32":
            return report
        return replace(report, loss=checkpoints.loss([case.tensors for case in self.cases], theirs))

    def _trace(self, reference: Reference, case: Case) -> dict[str, np.ndarray]:
        tensors = dict(reference.trace(case.tokens))
        tokens = reference.generate(case.tokens, case.new_tokens)
        return tensors | {"tokens": np.array(tokens, dtype=np.int64)}

    def _tolerances(self, reference: Reference, exact: Sequence[Mapping[str, np.ndarray]]) -> dict[int, float]:
        """In other precisions: from what transformers differs from itself between the two.

        The usual prompts are looked at in any case: a single short one may happen to differ little.
        """
        if self.settings.dtype == "float32":
            return {}
        half = load_reference("transformers", self.folder, self.settings.dtype)
        others = [tokens for tokens in map(self.tokenizer.encode, (*PROMPTS, PASSAGE)) if self._fits(tokens)]
        more = [reference.trace(tokens) for tokens in others]
        rounded = [half.trace(tokens) for tokens in [*(case.tokens for case in self.cases), *others]]
        return checkpoints.half_tolerances([*exact, *more], rounded)

    def _fits(self, tokens: Sequence[int]) -> bool:
        return 0 < len(tokens) <= self.config.n_positions - NEW_TOKENS

    def _forgive_near_ties(
        self, rows: list[Row], theirs: Mapping[str, np.ndarray], tolerances: Mapping[int, float]
    ) -> list[Row]:
        """Half precision may turn an argmax whose first two logits are closer than the tolerance, and all after it."""
        first, second = np.sort(theirs["last_logits"])[::-1][:2]
        close = first - second <= 2 * tolerances[8]
        note = f"turned; no promise in {self.settings.dtype}" + (", the first two logits nearly tie" if close else "")
        forgiven = {12} | ({10} if close else set())
        return [replace(r, ok=None, note=note) if r.ok is False and r.number in forgiven else r for r in rows]

    def _cause(self, tables: Sequence[Sequence[Row]], theirs: Sequence[Mapping[str, np.ndarray]]) -> str:
        """What the first failed checkpoint suggests, from the prompt in which it fails first."""
        failed = [(row.number, i) for i, rows in enumerate(tables) for row in rows if row.ok is False]
        if not failed:
            return ""
        number, index = min(failed)
        case = self.cases[index]
        weights = read_weights(self.folder)
        found = likely_cause(number, case.tensors, theirs[index], weights, case.tokens)
        return f"checkpoint {number} fails first: {found or 'none of the usual mistakes explains it'}"

    def _against_file(self, name: str, theirs: dict[str, np.ndarray], ready: Row, fingerprint: str) -> Report:
        """Another implementation's dump of the first prompt."""
        case = self.cases[0]
        rows = compare(case.tensors, theirs, reference=Path(name).name, tolerances={})
        return self._report(name, fingerprint, [ready, *rows], self._cause([rows], [theirs]))

    def _among_references(self) -> list[Report]:
        """The references beside each other: where two disagree, neither is a judge."""
        names = list(self._traces)
        reports = []
        for other in names[1:]:
            pairs = zip(self._traces[names[0]], self._traces[other], strict=True)
            tables = [
                [row for row in compare(a, b, reference=other, tolerances={}) if row.number != 3] for a, b in pairs
            ]
            rows = checkpoints.table(tables)
            reports.append(self._report(f"{names[0]} beside {other}", "", rows, ""))
        return reports

    def _report(self, reference: str, fingerprint: str, rows: list[Row], cause: str) -> Report:
        return Report(
            model=self.model,
            dtype=self.settings.dtype,
            reference=reference,
            fingerprint=fingerprint,
            prompts=len(self.cases),
            rows=rows,
            cause=cause,
            note="; ".join(self.skipped),
        )

    def draw(self, path: str) -> None:
        """Draw the difference from the first reference, by layer and position, of the longest prompt.

        Raises:
            ValidationError: matplotlib is not installed, or no reference has the residual stream.
        """
        from headrace.worker.fidelity.plot import draw_difference

        if not self._traces:
            raise ValidationError("--plot needs one of the references " + ", ".join(REFERENCES))
        name, traces = next(iter(self._traces.items()))
        index = max(range(len(self.cases)), key=lambda i: len(self.cases[i].tokens))
        try:
            draw_difference(self.cases[index].tensors["hidden"], traces[index]["hidden"], name, path)
        except ImportError as error:
            raise ValidationError(f"--plot needs matplotlib: {how_to_install('plot')}") from error


def report_json(reports: Sequence[Report]) -> str:
    """All reports as one JSON array."""
    return json.dumps([_plain(report) for report in reports])


def _plain(report: Report) -> dict[str, Any]:
    fields = {name: getattr(report, name) for name in ("model", "dtype", "reference", "fingerprint", "prompts")}
    rows = [row.to_json() for row in report.rows]
    loss = asdict(report.loss) if report.loss is not None else None
    return {**fields, "ok": report.ok, "cause": report.cause, "note": report.note, "loss": loss, "rows": rows}


def report_text(reports: Sequence[Report]) -> str:
    """All reports as tables."""
    out = io.StringIO()
    console = Console(file=out, width=150, highlight=False)
    for report in reports:
        _print(console, report)
    note = next((report.note for report in reports if report.note), "")
    if note:
        console.print(f"not compared: {note}")
    return out.getvalue().rstrip()


def _print(console: Console, report: Report) -> None:
    title = f"{report.model} in {report.dtype} with {report.reference}, the worst of {report.prompts} prompts"
    lines = Table("#", "checkpoint", "compared", "shape", "max abs", "max rel", "tolerance", "", title=title)
    for row in report.rows:
        verdict = {True: "ok", False: "FAILED", None: "-"}[row.ok]
        numbers = ["" if v is None else f"{v:.2g}" for v in (row.max_abs, row.max_rel, row.tolerance)]
        note = f"{verdict} {row.note}".strip()
        lines.add_row(str(row.number), row.name, row.compared, row.shape.replace("[", "\\["), *numbers, note)
    console.print(lines)
    if report.loss is not None:
        found = report.loss
        console.print(
            f"{report.dtype} costs, over {found.positions} positions: the next token's distribution is off by "
            f"{found.divergence:.2g} nats (Kullback-Leibler); the likeliest token is the same at {found.agreement:.1%}"
        )
    if report.cause:
        console.print(report.cause)
        console.print("next: headrace validate --prompt 'Hello.' --plot difference.png --reference transformers")
