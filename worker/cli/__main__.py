"""`python -m headrace.worker.cli` is the `headrace` command."""

from headrace.worker.cli.app import run

if __name__ == "__main__":
    run()
