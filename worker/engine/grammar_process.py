"""The process that tries grammars: it reads them as JSON lines and answers each with one.

Most of what a grammar costs is bounded by llguidance. Some of it is not: a number that must be a multiple of a million
takes minutes and half a gigabyte, and a chain of thousands of rules overflows the stack. So a grammar is compiled here
first, with single bytes as tokens and with limits on memory and time, before a worker compiles it for its model.

Run as a file: it imports nothing of the worker.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

#: Address space of this process, in bytes, and seconds of processor time for one grammar.
MEMORY_BYTES, CPU_S = 512 * 2**20, 1.0


class _Bytes:
    """A vocabulary of single bytes, with the names that llguidance reads."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _error(tokens: LLTokenizer, request: dict[str, Any]) -> str:
    matcher = LLMatcher(tokens, request["text"], log_level=0, limits=LLParserLimits(**request["limits"]))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


def main() -> None:
    """Answer requests until the input ends."""
    tokens = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256])
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = sys.stdout.buffer
    output.write(b'{"ready": true}\n')
    output.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # SIGPROF ends the process
        answer = {"error": _error(tokens, json.loads(line))}
        signal.setitimer(signal.ITIMER_PROF, 0)
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()


if __name__ == "__main__":
    main()
