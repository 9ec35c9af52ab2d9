"""`headrace convert`: models of other formats -> a directory with safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from headrace.worker.child_processes import die_with_parent
from headrace.worker.cli.errors import CommandFailed, command_errors
from headrace.worker.cli.local_stack import check_worker_packages, note


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--activation",
    metavar="NAME",
    help="activation_function for config.json, where the source does not say it: gelu_new for an old ckpt.pt",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def convert(source: Path, target: Path, activation: str | None, as_json: bool) -> None:
    """Convert the model SOURCE to the new directory TARGET, with safetensors, config.json and tokenizer files.

    SOURCE is a directory or a file: pytorch_model.bin (with shards), a .pt or .pth file beside a config.json,
    nanoGPT's ckpt.pt, a GGUF file, or a TensorFlow checkpoint of GPT-2's release. Pickles are read by a child
    process that only builds tensors. If the conversion fails, TARGET does not exist.
    """
    with command_errors(as_json):
        check_worker_packages()
        from headrace.model.convert import convert as converted
        from headrace.model.trusted_files import ModelError

        try:
            with note.status("converting") as shown:
                done = converted(source, Path(target), activation=activation, told=shown.update, wrap=die_with_parent)
        except ModelError as error:
            raise CommandFailed(error, as_json) from error
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done)))
        return
    click.echo(
        f"{done.target}: {done.family}, {done.parameters:,} parameters, from a {done.kind}; "
        f"{done.bytes / 1e6:,.1f} MB of weights"
    )
    for sentence in done.notes:
        click.echo(f"  {sentence}")
    named = done.target if target.is_absolute() else f"./{target}"  # without ./ it could be a name on the hub
    click.echo(f"Use it with HEADRACE_MODEL={named}")
