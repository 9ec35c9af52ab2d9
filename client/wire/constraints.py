"""Fields of a request that decide which tokens may follow: `structured_outputs`, `allowed_token_ids`, `bad_words`.

Forms are checked here without a library: their kinds, types and sizes. `client.jobs.grammar_check` reads patterns,
schemas and grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.field_values import string_list, to_list
from headrace.client.wire.unicode import is_unicode, parse_json
from headrace.client.wire.values import is_missing, show, show_name, to_python, to_whole

FIELD = "structured_outputs"
KINDS = ("choice", "regex", "json", "json_object", "grammar")
STRUCTURED_FORM = f"a map with one of {', '.join(KINDS)}"
#: Options of vLLM beside the form. Only these values are taken: white space in JSON is as Python writes it.
_OPTIONS = {
    "disable_fallback": (False, True),
    "disable_any_whitespace": (False, True),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}

MAX_CHOICES, MAX_CHOICE_BYTES = 1_024, 32_768
MAX_REGEX_BYTES, MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES = 8_192, 32_768, 65_536
#: The reader of grammars recurses along chains of references, so their number is bounded.
MAX_RULES, MAX_REFERENCES, MAX_SCHEMA_DEPTH = 300, 200, 64
MAX_ALLOWED, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES = 16_384, 128, 256
_TOKEN_IDS = 2**31

_RULE = re.compile(
    r"^[ \t]*[?!]?[A-Za-z_][\w.]*[ \t]*(?:\[[^\]\n]*\]|\{[^}\n]*\})?[ \t]*(?:\.\d+)?[ \t]*:", re.MULTILINE
)


def check_structured_outputs(value: Any) -> dict[str, Any] | None:
    """A form as it goes over the wire: one entry, named by its kind.

    `json_object` becomes the schema of an object, and a schema that is written as text is read.

    Raises:
        InvalidRequest: names the entry, its value and what is expected.
    """
    value = to_python(value)
    if is_missing(value):
        return None
    if not isinstance(value, dict):
        raise InvalidRequest(FIELD, show(value), STRUCTURED_FORM)
    for name in value:
        if not isinstance(name, str):
            raise InvalidRequest(FIELD, f"a map with the key {show(name)}", STRUCTURED_FORM)
    given = {name: to_python(entry) for name, entry in value.items() if not is_missing(entry)}
    for name, allowed in _OPTIONS.items():
        if name in given and not (isinstance(option := given.pop(name), bool) and option in allowed):
            raise InvalidRequest(f"{FIELD}.{name}", show(option), "no such option")
    if given.get("json_object") is False:
        del given["json_object"]
    for name in given:
        if name not in KINDS:
            raise InvalidRequest(f"{FIELD}.{show_name(name)}", show(given[name]), f"no such form; {STRUCTURED_FORM}")
    if len(given) != 1:
        raise InvalidRequest(FIELD, f"{len(given)} forms", STRUCTURED_FORM)
    ((kind, form),) = given.items()
    if kind == "json_object":
        if form is not True:
            raise InvalidRequest(f"{FIELD}.json_object", show(form), "True")
        return {"json": {"type": "object"}}
    check = {"choice": _choices, "regex": _regex, "json": _schema, "grammar": _grammar}[kind]
    return {kind: check(form)}


def _choices(value: Any) -> list[str]:
    value, field = to_list(value), f"{FIELD}.choice"
    expected = f"a list of 1 to {MAX_CHOICES} texts, together at most {MAX_CHOICE_BYTES} bytes"
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidRequest(field, show(value), expected)
    for index, choice in enumerate(value):
        if not isinstance(choice, str) or not is_unicode(choice):
            raise InvalidRequest(f"{field}[{index}]", show(choice), "a text of valid Unicode")
    if (size := sum(len(choice.encode()) for choice in value)) > MAX_CHOICE_BYTES:
        raise InvalidRequest(field, f"texts of {size} bytes", expected)
    return list(dict.fromkeys(value))


def _text(kind: str, value: Any, most: int, what: str) -> str:
    if not isinstance(value, str) or not is_unicode(value):
        raise InvalidRequest(f"{FIELD}.{kind}", show(value), f"{what}, a text of at most {most} bytes")
    if (size := len(value.encode())) > most:
        raise InvalidRequest(f"{FIELD}.{kind}", f"a text of {size} bytes", f"at most {most} bytes")
    return value


def _regex(value: Any) -> str:
    return _text("regex", value, MAX_REGEX_BYTES, "a regular expression")


def _grammar(value: Any) -> str:
    text = _text("grammar", value, MAX_GRAMMAR_BYTES, "a grammar in the syntax of Lark")
    if (rules := len(_RULE.findall(text))) > MAX_RULES:
        raise InvalidRequest(f"{FIELD}.grammar", f"a grammar of {rules} rules", f"at most {MAX_RULES} rules")
    return text


def _schema(value: Any) -> dict[str, Any]:
    field = f"{FIELD}.json"
    if isinstance(value, str):
        try:
            value = parse_json(_text("json", value, MAX_SCHEMA_BYTES, "a JSON schema"))
        except ValueError:
            raise InvalidRequest(field, show(value), "a JSON schema: the text is not JSON") from None
        except RecursionError:
            raise InvalidRequest(field, show(value), f"a JSON schema nested at most {MAX_SCHEMA_DEPTH} deep") from None
    if value is True:
        return {}  # JSON's schema of any value
    if not isinstance(value, dict):
        raise InvalidRequest(field, show(value), "a JSON schema: an object, or its JSON text")
    references = 0
    for depth, entry in _nested(value):
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(field, "a schema that is nested deeper", f"at most {MAX_SCHEMA_DEPTH} levels")
        references += isinstance(entry, dict) and "$ref" in entry
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError):
        raise InvalidRequest(field, show(value), "a JSON schema: its values must be those of JSON") from None
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(field, f"a schema of {size} bytes", f"at most {MAX_SCHEMA_BYTES} bytes")
    if references > MAX_REFERENCES:
        raise InvalidRequest(field, f"a schema with {references} references", f"at most {MAX_REFERENCES} times $ref")
    schema: dict[str, Any] = json.loads(text)  # a copy, with the keys that JSON would have
    return schema


def _nested(value: Any) -> Iterator[tuple[int, Any]]:
    """Every object and list inside a value, with its depth; no deeper than one level more than is allowed."""
    stack = [(1, value)]
    while stack:
        depth, entry = stack.pop()
        yield depth, entry
        if depth > MAX_SCHEMA_DEPTH:
            continue
        inside = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
        stack += [(depth + 1, item) for item in inside if isinstance(item, (dict, list))]


class Constraints(BaseModel):
    """Which tokens may follow. The names are those of vLLM."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    #: The form that the text must have: {"choice": [...]}, {"regex": ...}, {"json": schema}, {"json_object": True} or
    #: {"grammar": ...} in the syntax of Lark.
    structured_outputs: Annotated[dict[str, Any] | None, BeforeValidator(check_structured_outputs)] = Field(
        None, description=STRUCTURED_FORM
    )
    #: The only tokens that may follow. A text can end before max_tokens only if a token that ends it is among them.
    allowed_token_ids: Annotated[list[Annotated[int, BeforeValidator(to_whole)]] | None, BeforeValidator(to_list)] = (
        Field(
            None, min_length=1, max_length=MAX_ALLOWED, description=f"a list of 1 to {MAX_ALLOWED} token ids, or None"
        )
    )
    #: Texts that the model must not write, with and without a space before them.
    bad_words: Annotated[list[str], BeforeValidator(string_list)] = Field(
        default_factory=list,
        max_length=MAX_BAD_WORDS,
        description=f"at most {MAX_BAD_WORDS} texts, none empty, at most {MAX_BAD_WORD_BYTES} bytes each",
    )

    @field_validator("allowed_token_ids")
    @classmethod
    def _check_allowed(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not all(0 <= token < _TOKEN_IDS for token in value):
            raise ValueError("range")
        return value

    @field_validator("bad_words")
    @classmethod
    def _check_bad_words(cls, value: list[str]) -> list[str]:
        for text in value:
            if not text.strip() or not is_unicode(text) or len(text.encode()) > MAX_BAD_WORD_BYTES:
                raise ValueError("empty or long")
        return value

    @property
    def constrained(self) -> bool:
        """Whether not every token may follow."""
        return self.structured_outputs is not None or self.allowed_token_ids is not None or bool(self.bad_words)
