"""`python -m tests.numerics`: compare results with the committed digests on every instruction set of this CPU.

`--write` makes the digests again, after a change of the arithmetic; raise `fingerprint.NUMERICS` with it.
"""

from __future__ import annotations

import argparse

from tests import conftest  # noqa: F401 - a developer's own settings must not reach the results
from tests.numerics.comparison import FILE, compare, made, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"make {FILE.name} again")
    if parser.parse_args().write:
        write(made())
        print(f"wrote {FILE}")
    differing = compare(report=lambda line: print(line, flush=True))
    print("\n".join(differing) or "every result has the bits of the committed digests")
    return bool(differing)


if __name__ == "__main__":
    raise SystemExit(main())
