"""`python -m tests.zoo [NAME ...]`: run the zoo, print its table, and keep it for the docs with `--write`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tests import conftest  # noqa: F401 - a developer's own settings must not reach the zoo
from tests.zoo.report import FILE, table, write
from tests.zoo.running import run
from tests.zoo.table import ZOO


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="directories to run; all by default")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {FILE.name}, for the docs")
    arguments = parser.parse_args()
    known = {entry.name for entry in ZOO}
    if unknown := set(arguments.names) - known:
        parser.error(f"no such directory: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    entries = [entry for entry in ZOO if not arguments.names or entry.name in arguments.names]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="headrace-zoo-") as root:
        rows = run(entries, Path(root))
    print(table(rows))
    for row in rows:
        for fault in row.faults:
            print(f"{row.entry.name}: {fault}")
    wrong = [row.entry.name for row in rows if row.faults]
    print(f"{len(rows) - len(wrong)} of {len(rows)} directories are as they must be")
    if arguments.write and not wrong and not arguments.names:
        write(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
