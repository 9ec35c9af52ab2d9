"""The options that several commands share, and one option for each sampling parameter of `client.wire.requests`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from headrace.client import SamplingParams
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.unicode import parse_json
from headrace.client.wire.values import show

REPEATABLE = "may be given several times"
MODEL = "model to use, by name or as in HEADRACE_MODEL; the first of HEADRACE_MODEL by default"

#: What each sampling parameter does. The values it takes and its default come from the schema.
EFFECTS = {
    "max_tokens": "maximum number of new tokens",
    "temperature": "randomness of the samples",
    "top_p": "sample from the likeliest tokens whose probabilities add up to this",
    "top_k": "sample from this many of the likeliest tokens",
    "min_p": "sample from tokens that are at least this likely, relative to the likeliest",
    "n": "number of samples",
    "stop": "end the text before this string",
    "seed": "seed of the random numbers; the same seed gives the same text",
    "logprobs": "return the log probabilities of this many alternatives to each token (shown with --json)",
    "prompt_logprobs": "return those of the prompt's tokens and of this many alternatives to each (shown with --json)",
    "logit_bias": "add BIAS to the logit of the token ID before sampling",
    "presence_penalty": "subtract this from the logit of each token that has occurred in the new text",
    "frequency_penalty": "subtract this from a token's logit for each time it has occurred in the new text",
    "repetition_penalty": "divide positive logits of tokens that have occurred by this, and multiply negative ones",
    "echo": "begin the text with the prompt",
    "min_tokens": "do not end the text before this many new tokens",
    "ignore_eos": "continue after the end-of-text token",
    "stop_token_ids": "end the text at the token with this id",
    "structured_outputs": """the form of the text, in JSON: '{"regex": "[a-z]+"}', or with choice, json or grammar""",
    "allowed_token_ids": "write only the token with this id",
    "bad_words": "do not write this text",
    "skip_special_tokens": "leave special tokens out of the text",
    "parse_special_tokens": "read the names of special tokens in the prompt, such as <|endoftext|>, as these tokens",
    "add_special_tokens": "add the tokens that the model's tokenizer puts around a text",
    "adapter": "use this LoRA adapter of the model",
}
#: Options for fields of the request that are no sampling parameters.
PROMPT_OPTIONS = ("parse_special_tokens", "add_special_tokens")
#: The option that names a LoRA adapter.
ADAPTER_OPTION = "adapter"
#: Options whose value is written in JSON.
IN_JSON = {"structured_outputs"}

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(command: F) -> F:
    """Give a command an option for the adapter and for every sampling parameter, as the schema describes them."""
    return field_options((ADAPTER_OPTION, *SamplingParams.model_fields, *PROMPT_OPTIONS))(command)


def field_options(names: Sequence[str]) -> Callable[[F], F]:
    """Give a command an option for each of these fields of a request."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            command = _option(name, GenerateRequest.model_fields[name])(command)
        return command

    return decorate


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    flag, kind = "--" + name.replace("_", "-"), value_type(field.annotation)
    effect, allowed = EFFECTS[name], str(field.description).removesuffix(", or None")
    if kind is bool and field.default is not False:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", default=None, help=effect)
    if kind is bool:
        return click.option(flag, is_flag=True, default=None, help=effect)
    if get_origin(kind) is list:
        return click.option(flag, type=value_type(get_args(kind)[0]), multiple=True, help=f"{effect}; {REPEATABLE}")
    if name in IN_JSON:
        return click.option(flag, metavar="JSON", help=effect)
    if get_origin(kind) is dict:
        return click.option(flag, multiple=True, metavar="ID=BIAS", help=f"{effect}; {REPEATABLE}")
    default = "" if field.default is None else f"  [default: {field.default}]"
    return click.option(flag, type=kind, help=f"{effect}: {allowed}{default}")


def value_type(annotation: Any) -> Any:
    """The type of a value that is given: without `Annotated` and without `None`, at any depth.

    Raises:
        TypeError: the annotation allows several types, for which there is no option.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return value_type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        kinds = {value_type(kind) for kind in get_args(annotation) if kind is not type(None)}
        if len(kinds) != 1:
            raise TypeError(f"no option can have the type {annotation}")
        return kinds.pop()
    return annotation


def given_params(params: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the user gave, as `Client.submit` takes them.

    Raises:
        InvalidRequest: a `--logit-bias` is not ID=BIAS, or an option of IN_JSON is not JSON.
    """
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in params.items() if v is not None and v != ()}
    if "logit_bias" in given:
        try:
            pairs = [item.split("=", 1) for item in given["logit_bias"]]
            given["logit_bias"] = {int(token): float(bias) for token, bias in pairs}
        except ValueError:
            raise InvalidRequest("logit_bias", repr(given["logit_bias"]), "ID=BIAS, for example 50256=-100") from None
    for name in IN_JSON & given.keys():
        try:
            given[name] = parse_json(str(given[name]))
        except ValueError:
            raise InvalidRequest(name, show(given[name]), "JSON") from None
    return given
