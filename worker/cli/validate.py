"""`headrace validate`: the thirteen checkpoints against other implementations."""

from __future__ import annotations

from pathlib import Path

import click

from headrace.worker.cli.backends import Backends, pass_backends
from headrace.worker.cli.errors import FAILED, command_errors
from headrace.worker.cli.local_stack import check_worker_packages, note, settings_for
from headrace.worker.cli.options import MODEL


@click.command()
@click.option("--model", help=MODEL)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="transformers, tinygrad, candle, or a file of tensors (safetensors, npz, npy); may be given several times; "
    "all that are installed by default",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="number format that the model computes in",
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="compute this LoRA adapter beside the model, and compare with transformers and PEFT",
)
@click.option("--prompt", "prompts", multiple=True, help="check this prompt instead of the usual ones; may be repeated")
@click.option("--plot", type=click.Path(dir_okay=False), help="draw the error by layer and position into a PNG")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@pass_backends
def validate(
    backends: Backends,
    /,
    model: str | None,
    references: tuple[str, ...],
    dtype: str,
    adapter: Path | None,
    prompts: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Measure the model's error, tensor by tensor, against float64: the thirteen checkpoints.

    Starts its own embedded Redis and worker, so that the tensors come from the path that serves jobs. The
    errors of libraries are reported too; a file of tensors is judged like the model. Exit code 0 only if every
    checkpoint of the model and of the files passes.
    """
    with command_errors(as_json):
        check_worker_packages()
        from headrace.worker.fidelity.adapter import with_adapter
        from headrace.worker.fidelity.report import passed, report_json, report_text

        settings = settings_for(model, dtype=dtype)
        settings = settings.only(settings.model_name) if adapter is None else with_adapter(settings, adapter)
        validation = backends.validation(settings, references, prompts, adapter)
        with backends.start_local_stack(settings) as stack, note.status("comparing") as shown:
            reports = validation.run(stack.client, shown.update)
        if plot:
            validation.draw(plot)
    click.echo(report_json(reports) if as_json else report_text(reports))
    if not passed(reports):
        raise SystemExit(FAILED)
