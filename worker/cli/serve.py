"""`headrace serve`: the OpenAI API over HTTP."""

from __future__ import annotations

from typing import Any

import click

from headrace.client.wire.unicode import check_unicode
from headrace.config import load_settings
from headrace.worker.cli.backends import Backends, pass_backends
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.options import REPEATABLE


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0 takes a free port")
@click.option("--api-key", "api_keys", multiple=True, help=f"accept this key besides HEADRACE_API_KEYS; {REPEATABLE}")
@click.option("--insecure", is_flag=True, help="without keys, answer everybody on the network")
@click.option("--cors", multiple=True, metavar="ORIGIN", help=f"allow requests from web pages of ORIGIN; {REPEATABLE}")
@click.option("--files", metavar="DIR", help="directory for files and batches; HEADRACE_FILES_DIR by default")
@click.option("--timeout", type=click.FloatRange(min=0.1), help="seconds that a request may take; 600 by default")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="limit for each key; no limit by default")
@click.option("--max-body-bytes", type=click.IntRange(min=1), help="largest request; 4 MiB by default")
@click.option("--max-file-bytes", type=click.IntRange(min=1), help="largest uploaded file; 200 MiB by default")
@click.option("--max-files-bytes", type=click.IntRange(min=1), help="limit for all files together; 20 GiB by default")
@pass_backends
def serve(backends: Backends, /, **options: Any) -> None:
    """Answer HTTP as the OpenAI API does: completions, models, files, batches; /execute and /health.

    Requests go to the queue, whatever workers there are; no model is loaded here. See docs/http.md.
    """
    with command_errors(as_json=False):
        given = {name: value for name, value in options.items() if value is not None}
        check_unicode(given)
        backends.serve_http(load_settings(), announce=lambda line: click.echo(line, err=True), **given)
