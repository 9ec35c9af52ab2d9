"""Forms as llguidance reads them, and its errors as users read them. Clients and workers use the same."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from llguidance import LLParserLimits
    from llguidance._lib import JsonCompileOptions

#: Where only some bytes can follow, llguidance would allow only the tokens that the model's tokenizer makes of them,
#: which need not have these bytes: a tokenizer may change case or drop spaces. The last options of a grammar count.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: How the syntax error of a regular expression is drawn: the pattern, a line of carets, the reason.
_DRAWN = re.compile(r"regex parse error:\n(?P<pattern>.*)\n(?P<before> {4} *)\^+\nerror: (?P<reason>.*)", re.DOTALL)
_PLACE = re.compile(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): (?P<reason>.+)", re.DOTALL)
#: How the error of a schema begins.
_SCHEMA = "failed to compile JSON schema: "
#: How an anchor inside a pattern is refused.
_ANCHOR = "lookarounds not supported yet"
#: How bounds are named that were exceeded.
_TOO_LARGE = ("precomputation failed", "too big", "too large", "too many", "too complex")
#: How a matcher says that llguidance has failed.
_PANIC = "panic: "
#: The longest reason, in characters.
_LONGEST = 200


class Limits(TypedDict):
    """Bounds of the work for one grammar; see llguidance for their units."""

    initial_lexer_fuel: int
    step_lexer_fuel: int
    step_max_items: int
    max_lexer_states: int
    max_grammar_size: int
    verbose_errors: bool


#: A mask takes some milliseconds at most, and what is kept of a grammar some 20 MB.
LIMITS: Limits = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,  # they quote the text
}


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise ValueError where llguidance fails on a form by a panic, which is no Exception in Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(_PANIC) from None


def limits() -> LLParserLimits:
    """LIMITS, as llguidance takes them."""
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


def grammar_text(form: Mapping[str, Any]) -> str:
    """A form that `check_structured_outputs` has passed, as a grammar in llguidance's form of Lark.

    A choice becomes a regular expression: in it all texts are followed at the same time, also if one begins with
    another. JSON has white space as `json.dumps` writes it: a model that may write any amount may never come to an end.

    Raises:
        ValueError: the options for llguidance in a schema are wrong.
    """
    from llguidance import LLMatcher

    ((kind, value),) = form.items()
    if kind == "grammar":
        return f"{value}\n{_OPTIONS}"
    if kind == "json":
        text = LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=_JSON_STYLE)
    else:
        text = LLMatcher.grammar_from_regex(value if kind == "regex" else "|".join(map(_literal, value)))
    (grammar,) = json.loads(text)["grammars"]
    lark = f"start: %json {json.dumps(grammar['json_schema'])}" if kind == "json" else grammar["lark_grammar"]
    return f"{lark}\n{_OPTIONS}"


def _literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def reason_of(error: str) -> str:
    """What llguidance says of a grammar, in one line, with the place where it is wrong."""
    if error.startswith("NoExtension"):
        return "no text matches it"
    if error.startswith(_PANIC):
        return "llguidance cannot read it"
    if drawn := _DRAWN.search(error):
        reason = drawn["reason"].splitlines()[0]
        return reason if "\n" in drawn["pattern"] else f"{reason}, at character {len(drawn['before']) - 4}"
    if any(words in error for words in _TOO_LARGE):
        return "it is too large or too complex"
    if _ANCHOR in error:
        return "anchors such as ^, $ and \\b have no meaning inside a pattern: the whole text must match it"
    placed = _PLACE.match(error)
    line = (placed["reason"] if placed else error).strip().splitlines()[0]
    if line.startswith(_SCHEMA):
        line = line.removeprefix(_SCHEMA)
    elif placed and not line.startswith("invalid regex"):
        line += f", in line {placed['line']}, column {placed['column']}"
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
