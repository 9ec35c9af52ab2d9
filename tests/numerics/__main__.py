"""`python -m tests.numerics`: compare results with the committed digests on every instruction set of this CPU.

`--write` makes the digests again that differ or are missing: after a change of the arithmetic, with which
`fingerprint.NUMERICS` is raised, and for new models.
"""

from __future__ import annotations

import argparse

from tests import conftest  # noqa: F401 - a developer's own settings must not reach the results
from tests.numerics.comparison import FILE, compare, renew


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {FILE.name}")
    if parser.parse_args().write:
        print(f"{FILE}: new digests of {', '.join(renew()) or 'nothing'}")
    differing = compare(report=lambda line: print(line, flush=True))
    print("\n".join(differing) or "every result has the bits of the committed digests")
    return bool(differing)


if __name__ == "__main__":
    raise SystemExit(main())
