"""`headrace validate`: run jobs through client, queue and worker, and measure their tensors against float64.

Installed libraries, and files of tensors that the user names, are measured in the same way.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headrace.client import Client
from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import CheckpointResult
from headrace.client.wire.errors import HeadraceError
from headrace.config import Settings
from headrace.extras import how_to_install
from headrace.model.convert import convert
from headrace.model.hub import ModelError, config_path, find_model, is_gguf
from headrace.model.tokenizer import NoTokenizer, Tokenizer, load_tokenizer
from headrace.model.weights import check_weights, read_config
from headrace.worker.fidelity.adapter import ADAPTER, check_adapter
from headrace.worker.fidelity.diagnosis import likely_cause
from headrace.worker.fidelity.judge import judge
from headrace.worker.fidelity.prompts import BATCH_PROMPTS, PASSAGE, PROMPTS
from headrace.worker.fidelity.references import REFERENCES, Reference, ReferenceUnavailable, load_reference
from headrace.worker.fidelity.references.float64 import SCORES_LIMIT, Float64
from headrace.worker.fidelity.references.transformers import fold
from headrace.worker.fidelity.report import Report
from headrace.worker.fidelity.tensor_files import Loss, half_tolerances, read_tensors, table
from headrace.worker.fidelity.tensor_files import loss as loss_of
from headrace.worker.fidelity.text import TextCheck, TextResult

NEW_TOKENS = 10
#: The logits of longer prompts are not compared: at 1,024 tokens they take 200 MB.
LOGITS_LIMIT = 256
#: The subject of the report on our own worker.
OURS = "headrace"


class ValidationError(HeadraceError):
    """Raised when a reference is unknown, unavailable or unreadable; the message says what to do."""


@dataclass
class Case:
    """One prompt, the tensors of our worker, and those of float64."""

    tokens: list[int]
    new_tokens: int
    numbers: list[int]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)


class Validation:
    """Measures the errors of all implementations of one model: our worker, libraries, and files of tensors.

    Args:
        settings: of the worker; see `with_adapter`.
        references: names of libraries, and files of tensors.
        prompts: texts in place of the usual ones.
        adapter: a directory with a LoRA adapter, which is computed beside the model.

    Raises:
        ValidationError: the model or the adapter cannot be read, or a reference is unknown or cannot be loaded.
    """

    def __init__(
        self, settings: Settings, references: Sequence[str], prompts: Sequence[str], adapter: Path | None = None
    ) -> None:
        self.settings = settings
        self.model = settings.models[settings.model_name]
        try:
            self.folder = find_model(self.model)
            self.config = read_config(config_path(self.folder))
            check_weights(self.folder, self.config)
            self.tokenizer: Tokenizer = load_tokenizer(self.model, allow_shared=settings.allow_shared_model)
            if is_gguf(self.folder):
                self.folder = self._unpacked(self.folder)
            if adapter is not None:
                check_adapter(adapter, self.config, settings)
        except ModelError as error:
            raise ValidationError(str(error)) from error
        self.skipped: list[str] = []
        self.adapter = adapter
        #: The model with the adapter in its weights.
        self._folded = self.folder if adapter is None else self._fold(adapter)
        self._references, self._files = self._load(references)
        self._half = self._load_half()
        self.cases = self._cases(prompts)
        sizes = self.config.n_positions, self.config.vocab_size
        self.text = TextCheck(self.folder, self.tokenizer, *sizes, prompts=prompts)

    def _unpacked(self, file: Path) -> Path:
        """A directory with the weights of a GGUF file as the `gguf` package unpacks them, for the references.

        It is deleted with this object. Raises ModelError if it cannot be written.
        """
        convert(file, target := self._temporary())
        return target

    def _fold(self, adapter: Path) -> Path:
        """A directory with the model into whose weights PEFT has folded the adapter, in float64, for the references."""
        target = self._temporary()
        try:
            fold(self.folder, adapter, target)
        except (ReferenceUnavailable, ValueError) as error:
            raise ValidationError(f"an adapter is compared with PEFT. {error}") from error
        return target

    def _temporary(self) -> Path:
        place = tempfile.mkdtemp(prefix="headrace-validate-")
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        return Path(place) / "model"

    def _reference(self, name: str, dtype: str = "float32") -> Reference:
        """Load a library with the model, and with the adapter if there is one."""
        if name == "transformers":
            return load_reference(name, self.folder, dtype, adapter=self.adapter)
        return load_reference(name, self._folded, dtype)

    def _load(self, names: Sequence[str]) -> tuple[list[Reference], dict[str, dict[str, np.ndarray]]]:
        libraries, files = [], {}
        for name in names or REFERENCES:
            try:
                if name in REFERENCES:
                    libraries.append(self._reference(name))
                else:
                    files[name] = read_tensors(Path(name))
            except ReferenceUnavailable as error:
                if names:
                    raise ValidationError(str(error)) from error
                self.skipped.append(str(error))
            except ValueError as error:
                hint = f"a reference is one of {', '.join(REFERENCES)}, or a file of tensors"
                raise ValidationError(f"{error}; {hint}") from error
        return libraries, files

    def _load_half(self) -> Reference | None:
        """Load the reference from which the tolerances of lower precisions are derived; None for float32."""
        if self.settings.dtype == "float32":
            return None
        try:
            return self._reference("transformers", self.settings.dtype)
        except ReferenceUnavailable as error:
            raise ValidationError(f"the tolerances of {self.settings.dtype} come from transformers. {error}") from error

    def _cases(self, prompts: Sequence[str]) -> list[Case]:
        limit, ends = self.config.n_positions, self.tokenizer.end_of_text
        cases = []
        usual = PROMPTS if self.settings.dtype == "float32" else (*PROMPTS, PASSAGE)
        for prompt in prompts or usual:
            tokens = self._encoded(prompt) or ([] if ends is None else [ends])
            if self._fits(tokens):
                cases.append(Case(tokens, NEW_TOKENS, sorted(CHECKPOINTS)))
        if not prompts:
            known = self.tokenizer.vocab_size or self.config.vocab_size
            full = [(7919 * i) % known for i in range(limit - 1)]
            most = {8: LOGITS_LIMIT, 4: SCORES_LIMIT}
            numbers = [n for n in CHECKPOINTS if limit <= most.get(n, limit)]
            cases.append(Case(full, 1, numbers))
        if not cases:
            raise ValidationError(f"the prompts leave no room for {NEW_TOKENS} tokens in {limit} positions")
        return cases

    def run(self, client: Client, progress: Callable[[str], None] = lambda _: None) -> list[Report]:
        """Submit all prompts at once and measure the errors.

        Args:
            client: submits the jobs.
            progress: called with a description of each step.

        Raises:
            JobError: a job failed.
        """
        self._progress = progress
        common = {"temperature": 0, "ignore_eos": True}
        others = [
            {"prompt": text, "max_tokens": 40, **common} for text in BATCH_PROMPTS if self.config.n_positions >= 256
        ]
        own = common if self.adapter is None else {**common, "adapter": ADAPTER}
        wanted = [{"prompt": c.tokens, "max_tokens": c.new_tokens, "checkpoints": c.numbers, **own} for c in self.cases]
        self._progress(f"computing {len(self.cases)} prompts here")
        jobs = client.submit_many([*others, *wanted, *self.text.requests])[len(others) :]
        for case, job in zip(self.cases, jobs[: len(wanted)], strict=True):
            result = job.result(timeout=600)
            case.tensors = job.checkpoints()
        text = self.text.judge([job.result(timeout=600) for job in jobs[len(wanted) :]])
        self._progress(f"computing {len(self.cases)} prompts in float64")
        arbiter = self._arbiter = Float64(self._folded, keep_float64=self.adapter is not None)
        for case, exact in zip(
            self.cases, arbiter.traces([c.tokens for c in self.cases], logits_limit=LOGITS_LIMIT), strict=True
        ):
            case.exact = exact
        ours = [case.tensors for case in self.cases]
        tolerances = self._tolerances()
        tables = self._tables(ours, tolerances, job=True)
        rows = [self._ready_row(client), *table(tables)]
        loss = None if self._half is None else loss_of(ours, [case.exact for case in self.cases])
        return [
            self._report(
                OURS, rows, fingerprint=result.fingerprint, cause=self._cause(tables, ours), loss=loss, text=text
            ),
            *(self._library_report(reference) for reference in self._references),
            *(self._file_report(name, found, tolerances) for name, found in self._files.items()),
        ]

    def _ready_row(self, client: Client) -> CheckpointResult:
        ready = client.status().serves(self.settings.model_name)
        return CheckpointResult(
            0, CHECKPOINTS[0][0], f"{len(self.cases)} jobs through client, queue and worker", ok=ready
        )

    def _library_report(self, reference: Reference) -> Report:
        """Report the error of a library in float32. It never fails the validation."""
        theirs = []
        for i, case in enumerate(self.cases):
            count = f"prompt {i + 1} of {len(self.cases)}, {len(case.tokens)} tokens"
            self._progress(f"computing with {reference.name}: {count}")
            tokens = np.array(reference.generate(case.tokens, case.new_tokens), dtype=np.int64)
            theirs.append({**reference.trace(case.tokens), "tokens": tokens})
        rows = table(self._tables(theirs, {}, job=False))
        return self._report(reference.name, rows, judged=False)

    def _file_report(self, name: str, tensors: dict[str, np.ndarray], tolerances: Mapping[int, float]) -> Report:
        """Report the error of another implementation's tensors of the first prompt. It can fail the validation."""
        (rows,) = self._tables([tensors], tolerances, job=False)
        return self._report(name, rows, cause=self._cause([rows], [tensors]), prompts=1)

    def _tables(
        self, found: Sequence[Mapping[str, np.ndarray]], tolerances: Mapping[int, float], *, job: bool
    ) -> list[list[CheckpointResult]]:
        """Return rows 1 to 12 of the first prompts; `found` has an implementation's tensors of each."""
        cases = self.cases[: len(found)]
        return [
            judge(tensors, case.exact, margins, tolerances=tolerances, job=job)
            for case, tensors, margins in zip(cases, found, self._margins(found), strict=True)
        ]

    def _margins(self, found: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray | None]:
        """Return `Float64.margins` of each prompt's new tokens. They are infinite if tokens are invalid or missing."""
        margins: list[np.ndarray | None] = [None] * len(found)
        wanted: dict[int, list[int]] = {}
        for i, tensors in enumerate(found):
            if (tokens := tensors.get("tokens")) is None:
                continue
            case, known = self.cases[i], np.arange(self.config.vocab_size)
            if tokens.shape != (case.new_tokens,) or not np.isin(tokens, known).all():
                margins[i] = np.full(max(1, tokens.size), np.inf)
            elif case.new_tokens == 1:  # the prompt may fill the context, so it is not computed again
                logits = case.exact["last_logits"]
                margins[i] = logits.max() - logits[tokens.astype(np.int64)]
            else:
                wanted[i] = tokens.astype(np.int64).tolist()
        computed = self._arbiter.margins([self.cases[i].tokens for i in wanted], list(wanted.values()))
        for i, each in zip(wanted, computed, strict=True):
            margins[i] = each
        return margins

    def _tolerances(self) -> dict[int, float]:
        """Return the tolerances of a lower precision, derived from the error of transformers in that precision.

        The default prompts are always included, because the error of a single short prompt may be small by chance.
        """
        if self._half is None:
            return {}
        self._progress(f"computing with {self._half.name} in {self.settings.dtype}")
        defaults = [tokens for tokens in map(self._encoded, (*PROMPTS, PASSAGE)) if self._fits(tokens)]
        exact = [*(case.exact for case in self.cases), *self._arbiter.traces(defaults)]
        rounded = [self._half.trace(tokens) for tokens in [*(case.tokens for case in self.cases), *defaults]]
        return half_tolerances(exact, rounded)

    def _encoded(self, prompt: str) -> list[int]:
        """Token ids of a prompt; of its bytes, if the model has no tokenizer that can be computed."""
        try:
            return self.tokenizer.encode(prompt)
        except NoTokenizer:
            return [byte % self.config.vocab_size for byte in prompt.encode()]

    def _fits(self, tokens: Sequence[int]) -> bool:
        return 0 < len(tokens) <= self.config.n_positions - NEW_TOKENS

    def _cause(self, tables: Sequence[Sequence[CheckpointResult]], found: Sequence[Mapping[str, np.ndarray]]) -> str:
        """Describe the first failed checkpoint and its likely cause, from the first prompt that fails it."""
        failed = [(row.number, i) for i, rows in enumerate(tables) for row in rows if row.ok is False]
        if not failed:
            return ""
        number, index = min(failed)
        case = self.cases[index]
        cause = likely_cause(number, found[index], case.exact, self._arbiter, case.tokens)
        return f"checkpoint {number} fails first: {cause or 'no common mistake explains it'}"

    def _report(
        self,
        subject: str,
        rows: list[CheckpointResult],
        *,
        fingerprint: str = "",
        cause: str = "",
        judged: bool = True,
        prompts: int | None = None,
        loss: Loss | None = None,
        text: TextResult | None = None,
    ) -> Report:
        return Report(
            model=self.model if self.adapter is None else f"{self.model} with {self.adapter}",
            dtype=self.settings.dtype,
            subject=subject,
            fingerprint=fingerprint,
            prompts=prompts or len(self.cases),
            rows=rows,
            cause=cause,
            note="; ".join(self.skipped),
            judged=judged,
            loss=loss,
            text=text,
        )

    def draw(self, path: str) -> None:
        """Plot the error of the residual stream by layer and position.

        The plot is of the first file that contains the tensor `hidden`, or else of our worker and the longest prompt.

        Raises:
            ValidationError: matplotlib is not installed.
        """
        from headrace.worker.fidelity.plot import draw_difference

        case = max(self.cases, key=lambda c: len(c.tokens))
        name, found = OURS, case.tensors["hidden"]
        for file, tensors in self._files.items():
            if "hidden" in tensors and tensors["hidden"].shape == self.cases[0].exact["hidden"].shape:
                case, name, found = self.cases[0], Path(file).name, tensors["hidden"]
                break
        try:
            draw_difference(found, case.exact["hidden"], name, path)
        except ImportError as error:
            raise ValidationError(f"--plot needs matplotlib: {how_to_install('plot')}") from error
