"""The `headrace` command: one module for each of its commands.

Torch is loaded only where it is needed: by `up`, and in the worker that other commands may start as a child process.
"""

from headrace.worker.cli.app import main, run

__all__ = ["main", "run"]
