"""Parameters of other servers and libraries: which of their values ask for nothing, and which name was probably meant.

Programs that others wrote send every parameter they know, most of them with the value that turns it off. Such a value
is dropped before a request is checked; any other value of a parameter that headrace does not have is refused by name.
The table serves every way in: `Client.submit`, tables and batch files, HTTP, messages of other producers, the offline
engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from headrace.client.wire.values import MAX_NAME, is_missing, to_python, to_whole

#: A seed that means none, as in vLLM and llama.cpp. Other negative numbers are seeds, as there.
NO_SEED = -1

Neutral = Callable[[Any, Mapping[str, Any]], bool]


class Foreign(NamedTuple):
    """A parameter that headrace does not have, or a value of another server for one that it has.

    Attributes:
        is_neutral: whether a value asks for nothing, given all fields of the request.
        neutral: these values in words; empty if only None asks for nothing.
        advice: why others are refused, or what to use instead.
    """

    is_neutral: Neutral
    neutral: str = ""
    advice: str = ""

    @property
    def expected(self) -> str:
        """What is expected in place of another value."""
        allowed = f"no such parameter, except {self.neutral}" if self.neutral else "no such parameter"
        return f"{allowed}; {self.advice}" if self.advice else allowed


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of the same kind: `False` is not 0, but 1.0 is 1."""
    try:
        return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
    except Exception:
        return False  # a value whose comparison raises


def only(*values: Any, advice: str = "") -> Foreign:
    """A parameter that asks for nothing with these values, and with None."""
    shown = " or ".join(repr(value) for value in values)
    return Foreign(lambda value, _: any(_same(value, other) for other in values), shown, advice)


def any_of(kind: type | tuple[type, ...], words: str) -> Foreign:
    """A parameter that asks for nothing with any value of a type."""
    return Foreign(lambda value, _: isinstance(value, kind) and _is_plain(value, kind), words)


def _is_plain(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, bool) == (kind is bool)


def _is_n(value: Any, fields: Mapping[str, Any]) -> bool:
    n = fields.get("n")
    return _same(value, 1 if is_missing(n) else to_whole(n))


def _is_sampling(value: Any, fields: Mapping[str, Any]) -> bool:
    temperature = fields.get("temperature")
    return isinstance(value, bool) and value != (not is_missing(temperature) and _same(to_python(temperature), 0))


def _is_off(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(option is None or option is False for option in value.values())


def _has_prompt(fields: Mapping[str, Any]) -> bool:
    return not is_missing(fields.get("prompt"))


NO_VALUE = Foreign(lambda _value, _fields: False)
_TEXT = any_of(str, "text")
_FLAG = any_of(bool, "True or False")
_NUMBER = any_of((int, float), "a number")
_ZERO, _ONE, _OFF = only(0), only(1), only(False)
_GREEDY = "headrace samples, or with temperature=0 takes the most probable token"
_SCHEMA = "use structured_outputs={'json': schema}"
_FORMAT = f"{_SCHEMA} or {{'json_object': True}}"
_REGEX = "use structured_outputs={'regex': pattern}"
_CHOICE = "use structured_outputs={'choice': [...]}"
_GRAMMAR = "use structured_outputs={'grammar': text}, in the syntax of Lark"
_FORMS = "use structured_outputs"
_TOOLS = "chat_template_kwargs passes variables to the model's chat template; calls in the text are not parsed"
_READS_TEXT = "the models read and write text"
_TRUNCATION = "shorten the prompt before you send it"
_PENALTY = "use repetition_penalty, presence_penalty or frequency_penalty"
_PROMPT_SCORES = "use prompt_logprobs"

#: Parameter -> its neutral values. Headrace's own parameters are here if others turn them off with another value.
FOREIGN: dict[str, Foreign] = {
    # headrace has these; the values are those of vLLM, llama.cpp and the chat API
    "seed": only(NO_SEED),
    "priority": only(0),
    "logprobs": only(False),
    "stop": only(""),  # an empty cell of a table, or of a form
    "bad_words": only([]),
    "structured_outputs": only({}),
    "logit_bias": only([]),  # PHP writes an empty map as a list
    "messages": Foreign(lambda value, fields: _same(value, []) and _has_prompt(fields)),
    "chat_template_kwargs": only({}, []),
    "add_generation_prompt": Foreign(lambda value, fields: isinstance(value, bool) and _has_prompt(fields)),
    # OpenAI
    "suffix": only("", advice="GPT-2 can only continue the prompt"),
    "best_of": Foreign(_is_n, "n", "all n samples are returned; choose among them by their logprobs"),
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "metadata": any_of(dict, "an object"),
    "store": _OFF,
    "service_tier": only("auto", "default"),
    "stream_options": Foreign(_is_off, "{}", "only streams over HTTP have options"),
    "extra_body": only({}, advice="the openai package merges it into the body"),
    "extra_headers": only({}),
    "extra_query": only({}),
    "reasoning_effort": only("none"),
    "chat_template": NO_VALUE._replace(advice="the template of the model's directory is used"),
    "documents": only([], advice=_TOOLS),
    "response_format": only({"type": "text"}, advice=_FORMAT),
    "modalities": only(["text"]),
    "audio": NO_VALUE._replace(advice=_READS_TEXT),
    "prediction": NO_VALUE._replace(advice="headrace proposes tokens by itself; see HEADRACE_DRAFT_TOKENS"),
    "web_search_options": NO_VALUE._replace(advice=_READS_TEXT),
    "verbosity": only("medium"),
    "prompt_cache_retention": _TEXT,
    "tools": only([], advice=_TOOLS),
    "tool_choice": only("none", "auto", advice=_TOOLS),
    "functions": only([], advice=_TOOLS),
    "function_call": only("none", "auto", advice=_TOOLS),
    "parallel_tool_calls": _FLAG,
    "top_logprobs": only(0, advice="use logprobs, the number of alternatives"),
    # vLLM
    "use_beam_search": only(False, advice=_GREEDY),
    "beam_width": only(1, advice=_GREEDY),
    "length_penalty": only(1, advice=_GREEDY),
    "early_stopping": only(False, advice=_GREEDY),
    "spaces_between_special_tokens": _FLAG,  # has no effect in tokenizers of the library `tokenizers` either
    "include_reasoning": _FLAG,  # there is none
    "cache_salt": _TEXT,
    "include_stop_str_in_output": only(False, advice="stop_reason says which stop string ended the text"),
    "truncate_prompt_tokens": NO_VALUE._replace(advice=_TRUNCATION),
    "truncation_side": only("left", "right"),
    "logprob_token_ids": only([], advice="use logprobs, the number of alternatives"),
    "prompt_embeds": only([], advice="use prompt, text or token ids"),
    "detokenize": only(True),
    "flat_logprobs": _OFF,
    "guided_decoding": only({}, advice=_FORMS),
    "guided_json": NO_VALUE._replace(advice=_SCHEMA),
    "guided_regex": NO_VALUE._replace(advice=_REGEX),
    "guided_choice": NO_VALUE._replace(advice=_CHOICE),
    "guided_grammar": NO_VALUE._replace(advice=_GRAMMAR),
    "structural_tag": NO_VALUE._replace(advice=_FORMS),
    "guided_decoding_backend": _TEXT,
    "guided_whitespace_pattern": _TEXT,
    "logits_processors": only([], advice="use logit_bias"),
    "return_tokens_as_token_ids": _OFF,
    "return_token_ids": _OFF,
    "return_token_offsets": _OFF,
    "return_mm_kwargs": _FLAG,
    "mm_processor_kwargs": only({}),
    "multi_modal_data": only({}),
    "session_id": _TEXT,
    "vllm_xargs": only({}),
    "extra_args": only({}),
    "kv_transfer_params": only({}),
    "ec_transfer_params": only({}),
    "repetition_detection": NO_VALUE._replace(advice=_PENALTY),
    "thinking_token_budget": only(-1),
    "routed_experts_prompt_start": _ZERO,
    "watermarking": _OFF,
    "stream_interval": only(1),
    "skip_clone": _FLAG,
    "skip_reading_prefix_cache": _FLAG,
    # llama.cpp
    "cache_prompt": _FLAG,
    "id_slot": only(-1),
    "n_keep": _ZERO,
    "n_probs": only(0, advice="use logprobs, the number of alternatives"),
    "min_keep": _ZERO,
    "typical_p": _ONE,
    "tfs_z": _ONE,
    "top_a": _ZERO,
    "epsilon_cutoff": _ZERO,
    "eta_cutoff": _ZERO,
    "mirostat": _ZERO,
    "mirostat_mode": _ZERO,
    "mirostat_tau": _NUMBER,
    "mirostat_eta": _NUMBER,
    "dynatemp_range": _ZERO,
    "dynatemp_exponent": _NUMBER,
    "xtc_probability": _ZERO,
    "xtc_threshold": _NUMBER,
    "dry_multiplier": _ZERO,
    "dry_base": _NUMBER,
    "dry_allowed_length": _NUMBER,
    "dry_penalty_last_n": _NUMBER,
    "repeat_penalty": only(1, advice="use repetition_penalty"),
    "repeat_last_n": only(-1, advice="penalties count all tokens"),
    "grammar": only("", advice=_GRAMMAR),
    "json_schema": only({}, advice=_SCHEMA),
    "lora": only([]),
    "image_data": only([]),
    "t_max_predict_ms": only(0, -1, advice="use timeout_s"),
    "timings_per_token": _OFF,
    "return_progress": _OFF,
    "return_tokens": _OFF,
    "post_sampling_probs": _OFF,
    # TGI and transformers
    "do_sample": Foreign(_is_sampling, "what temperature says", "temperature=0 is greedy, anything above samples"),
    "details": only(False, advice="use logprobs"),
    "decoder_input_details": only(False, advice=_PROMPT_SCORES),
    "return_full_text": only(False, advice="use echo=True"),
    "top_n_tokens": only(0, advice="use logprobs, the number of alternatives"),
    "truncate": NO_VALUE._replace(advice=_TRUNCATION),
    "watermark": _OFF,
    "num_beams": only(1, advice=_GREEDY),
    "num_beam_groups": only(1, advice=_GREEDY),
    "diversity_penalty": _ZERO,
    "penalty_alpha": _ZERO,
    "no_repeat_ngram_size": only(0, advice=_PENALTY),
    "use_cache": _FLAG,
    # SGLang
    "no_stop_trim": only(False, advice="stop_reason says which stop string ended the text"),
    "regex": NO_VALUE._replace(advice=_REGEX),
    "ebnf": NO_VALUE._replace(advice=_GRAMMAR),
    "return_hidden_states": only(False, advice="use checkpoints"),
}

#: Names of parameters in other libraries -> the name in headrace, for advice in error messages.
ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens_to_sample": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_gen_len": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
    "num_return_sequences": "n",
    "num_samples": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "eos_token_id": "stop_token_ids",
    "random_seed": "seed",
    "request_id": "id",
    "inputs": "prompt",
    "input": "prompt",
    "input_ids": "prompt",
    "prompt_token_ids": "prompt",
    "prompts": "prompt",
    "text": "prompt",
    "timeout": "timeout_s",
}


def drop_neutral(fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields that ask for something: without missing values, and without neutral values of the table."""
    kept = {}
    for name, value in fields.items():
        foreign = FOREIGN.get(name) if isinstance(name, str) else None
        if is_missing(value) or (foreign is not None and foreign.is_neutral(to_python(value), fields)):
            continue
        kept[name] = value
    return kept


def advice(name: Any, public: Collection[str]) -> str:
    """What is expected in place of a parameter that does not exist.

    Args:
        name: the name that a caller used.
        public: the names that the caller may use.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME:
        name = ""
    if (foreign := FOREIGN.get(name)) is not None and name not in public:
        return foreign.expected
    others = [other for other in public if other != name]
    simple = name.strip().lower().replace("-", "_")
    near = [simple] if simple in others else difflib.get_close_matches(simple, others, n=1, cutoff=0.6)
    if (alias := ALIASES.get(simple)) in others:
        near = [str(alias)]
    if near:
        return f"no such parameter; did you mean {near[0]}?"
    return f"one of {', '.join(sorted(others))}"
