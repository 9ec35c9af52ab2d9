"""Grammars of `structured_outputs`: compiled for the tokens of a model by llguidance, and kept for later jobs.

A matcher follows one text: it says which tokens may come next, and whether the text may end. Copies of a matcher share
what was computed of the grammar. All work of a grammar is bounded by LIMITS; none of it is done in the engine's thread.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.client.wire.constraints import FIELD
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.grammar_text import LIMITS, grammar_text, limits, panics_as_errors, reason_of
from headrace.extras import how_to_install
from headrace.model.tokenizer import Tokenizer
from headrace.model.tokenizers.ids_only import TokenIdsOnly
from headrace.worker.engine.helper_process import Helpers, TooLong
from headrace.worker.engine.mask_budget import MaskGroup

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: Grammars that are kept for later jobs.
KEPT = 32
#: Grammars that are compiled at the same time.
MAX_THREADS = 4
#: Seconds that trying a grammar may take. Its processor time is bounded more narrowly.
TIME_LIMIT_S = 30.0


class Grammar:
    """A grammar compiled for the tokens of a model."""

    def __init__(self, tokenizer: LLTokenizer, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._first = self.compile()
        #: Of the sequences that follow it.
        self.group = MaskGroup()
        #: Whether its bounds were exceeded: then others compile it again.
        self.worn = False
        #: The mask of the first token: one bit for each token and one for the end of the text.
        self.first_mask = b""
        #: The bytes with which all texts begin.
        self.beginning = b""
        #: Why no text can be computed with it; empty if one can.
        self.error = str(self._first.get_error()) or self._first_mask_error()

    def compile(self) -> LLMatcher:
        """A matcher that shares nothing with others. It is in an error state if the grammar is wrong or too large."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, self._text, log_level=0, limits=limits())

    def _first_mask_error(self) -> str:
        """Compute the first mask, which may take longer than later ones, and which shows whether a text can begin."""
        matcher = self.matcher()
        self.first_mask = matcher.compute_bitmask()
        if error := str(matcher.get_error()):
            return error
        self.beginning = matcher.compute_ff_bytes()
        return ""

    def matcher(self) -> LLMatcher:
        """A matcher at the beginning of a text."""
        return self._first.deep_copy()


class Grammars:
    """Compiles the grammars of one model, and keeps the last KEPT. May be used from any thread.

    Args:
        tokenizer: of the model.
        vocab_size: every token id is below it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        #: The texts of all tokens, once a grammar has been compiled.
        self.token_bytes: frozenset[bytes] = frozenset()
        self.sorted_token_bytes: list[bytes] = []

    def knows(self, form: Mapping[str, Any] | None) -> bool:
        """Whether `get` answers at once: there is nothing to compile."""
        return form is None or ((kept := self._kept.get(_key(form))) is not None and not kept.worn)

    def get(self, form: Mapping[str, Any]) -> Grammar:
        """The grammar of a form, compiled now if it is not kept.

        Args:
            form: as `structured_outputs` of a request.

        Raises:
            JobFailed: it cannot be read, is too large, or the library is missing.
        """
        key = _key(form)
        with self._lock:
            if (grammar := self._kept.get(key)) is not None and not grammar.worn:
                self._kept.move_to_end(key)
                return grammar
        ((kind, _),) = form.items()
        try:
            with panics_as_errors():
                grammar = self._compiled(kind, form)
        except ValueError as error:
            raise JobFailed("invalid_request", f"{FIELD}.{kind}: {reason_of(str(error))}") from None
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _compiled(self, kind: str, form: Mapping[str, Any]) -> Grammar:
        """Compile a form. Raises ValueError if it cannot be read, and JobFailed if it must not be compiled here."""
        vocabulary, text = self._vocabulary(), grammar_text(form)
        error = _tried(kind, text)
        grammar = None if error else Grammar(vocabulary, text)
        if grammar is None or grammar.error:
            raise ValueError(error if grammar is None else grammar.error)
        return grammar

    def _vocabulary(self) -> LLTokenizer:
        if find_spec("llguidance") is None:
            raise JobFailed(
                "structured_outputs_missing",
                f"{FIELD}: this worker lacks llguidance, which the extra [structured] installs: "
                f"{how_to_install('structured')}",
            )
        if isinstance(self._tokenizer, TokenIdsOnly):
            raise JobFailed("no_tokenizer", self._tokenizer.reason)
        with self._lock:
            if self._tokens is None:
                vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
                self.token_bytes = frozenset(vocabulary.tokens[:-1]) - {b""}
                self.sorted_token_bytes = sorted(self.token_bytes)
                self._tokens = _for_library(vocabulary)
            return self._tokens


def _tried(kind: str, text: str) -> str:
    """Try a grammar in a process that can be ended. Returns why it cannot be read, or nothing; raises JobFailed."""
    try:
        answer = helpers.ask({"text": text, "limits": LIMITS}, TIME_LIMIT_S)
    except (TooLong, OSError, ValueError):
        raise JobFailed(
            "grammar_too_complex", f"{FIELD}.{kind}: compiling it takes more time or memory than is allowed"
        ) from None
    return str(answer["error"])


def _key(form: Mapping[str, Any]) -> str:
    return json.dumps(form)  # unsorted: the properties of an object are written in the order of the schema


class _Vocabulary:
    """The tokens of a model as llguidance reads them. `bos_token_id` to `__call__` are its names.

    Special tokens have no text, so no grammar allows them. The end of a text is a token of its own behind all others:
    which tokens of the model end a text is decided for each request.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]
        hidden = tokenizer.special_ids
        self.tokens = [b"" if token in hidden else tokenizer.known_bytes(token) for token in range(vocab_size)]
        self.tokens.append(b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:  # noqa: ARG002 - grammars are compiled without forced tokens
        return []


def _for_library(vocabulary: _Vocabulary) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    end = vocabulary.eos_token_id
    return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=end + 1, eos_token=[end])


#: Where grammars are tried.
helpers = Helpers(Path(__file__).with_name("grammar_process.py"))
atexit.register(helpers.close)
#: Where jobs are prepared whose grammars have to be compiled.
threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="headrace-grammar")
