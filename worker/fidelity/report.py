"""The results of `headrace validate`, as JSON and as tables."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.client.wire.comparison import CheckpointResult
from headrace.worker.fidelity.references.float64 import NAME
from headrace.worker.fidelity.tensor_files import Loss
from headrace.worker.fidelity.text import TextResult


@dataclass(frozen=True)
class Report:
    """One implementation's thirteen checkpoints, measured against float64."""

    model: str
    dtype: str
    #: The implementation under test: "headrace", a library and its version, or a file.
    subject: str
    fingerprint: str
    prompts: int
    rows: list[CheckpointResult]
    cause: str = ""
    note: str = ""
    #: Whether an error over the tolerance fails the validation. A library's error is only reported.
    judged: bool = True
    #: The accuracy that a precision other than float32 costs.
    loss: Loss | None = None
    #: The row without a number: prompt ids, text and end of text. None for other implementations.
    text: TextResult | None = None

    @property
    def ok(self) -> bool:
        """Whether at least one checkpoint was compared and none failed, the text included."""
        if self.text is not None and self.text.ok is False:
            return False
        return all(row.ok is not False for row in self.rows) and any(row.ok for row in self.rows if 0 < row.number < 12)


def passed(reports: Sequence[Report]) -> bool:
    """Return whether all reports that can fail the validation are ok."""
    return all(report.ok for report in reports if report.judged)


def report_json(reports: Sequence[Report]) -> str:
    """Format all reports as one JSON array."""
    return json.dumps([_plain(report) for report in reports])


def _plain(report: Report) -> dict[str, Any]:
    fields = {name: getattr(report, name) for name in ("model", "dtype", "subject", "fingerprint", "prompts", "judged")}
    rows = [row.to_json() for row in report.rows]
    loss = asdict(report.loss) if report.loss is not None else None
    result = {
        "reference": NAME,
        "ok": report.ok,
        "cause": report.cause,
        "note": report.note,
        "loss": loss,
        "rows": rows,
        "text": None if report.text is None else report.text.to_json(),
    }
    return fields | result


def report_text(reports: Sequence[Report]) -> str:
    """Format all reports as tables."""
    out = io.StringIO()
    console = Console(file=out, width=150, highlight=False)
    for report in reports:
        _print(console, report)
    note = next((report.note for report in reports if report.note), "")
    if note:
        console.print(f"not compared: {note}")
    return out.getvalue().rstrip()


def _print(console: Console, report: Report) -> None:
    title = (
        f"{report.subject} measured against {NAME}: {report.model} in {report.dtype}, worst of {report.prompts} prompts"
    )
    lines = Table("#", "checkpoint", "compared", "shape", "max abs", "max rel", "tolerance", "", title=title)
    verdicts = {True: "ok", False: "FAILED" if report.judged else "over the tolerance", None: "-"}
    for row in report.rows:
        numbers = ["" if v is None else f"{v:.2g}" for v in (row.max_abs, row.max_rel, row.tolerance)]
        note = f"{verdicts[row.ok]} {row.note}".strip()
        lines.add_row(str(row.number), row.name, row.compared, row.shape.replace("[", "\\["), *numbers, note)
    if (text := report.text) is not None:
        shown = f"{verdicts[text.ok]} {text.note}".strip().replace("[", "\\[")
        lines.add_row("", text.name, text.compared, f"{text.texts} texts", "", "", "", shown)
    console.print(lines)
    if report.loss is not None:
        found = report.loss
        console.print(
            f"{report.dtype} costs, over {found.positions} positions: the next token's distribution is off by "
            f"{found.divergence:.2g} nats (Kullback-Leibler); the likeliest token is the same at {found.agreement:.1%}"
        )
    over = ", ".join(str(row.number) for row in report.rows if row.ok is False)
    if over and not report.judged:
        console.print(f"{report.subject}'s own error is over the tolerance at checkpoint {over}; this fails nothing")
    if report.cause:
        console.print(report.cause)
        file = "" if report.subject == "headrace" else f" --reference {report.subject}"
        console.print(f"next: headrace validate --prompt 'Hello.' --plot difference.png{file}")
