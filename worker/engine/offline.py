"""The engine under the names that vLLM gives to offline use: no Redis, no queue, everything in this process.

from headrace.worker.engine.offline import LLM, SamplingParams

llm = LLM(model="demo")
for output in llm.generate(["Hello.", "The river"], SamplingParams(temperature=0, max_tokens=10)):
    print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import structlog
from rich.console import Console
from rich.progress import track

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Choice, Result, TokenLogprob
from headrace.config import load_settings
from headrace.config.logging import setup_logging
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.engine import Engine

#: vLLM's names of types that are not ours.
_DTYPES = {"half": "float16", "float": "float32"}
#: What vLLM's engine may be told of its memory and speed; it changes no result, and here nothing.
_IDLE = {
    "block_size",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "swap_space",
    "trust_remote_code",
}
#: Parameters of vLLM's that may be given with their defaults and nothing else.
_NOT_COMPUTED = {
    "prompt_logprobs",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "structured_outputs",
    "allowed_token_ids",
    "bad_words",
    "extra_args",
    "truncate_prompt_tokens",
}
#: Arguments that may be given if they say what is so.
_ONLY: dict[str, tuple[Any, ...]] = {
    "data_parallel_size": (1,),
    "load_format": ("auto", "safetensors"),
    "pipeline_parallel_size": (1,),
    "quantization": (None,),
    "revision": (None,),
    "runner": ("auto", "generate"),
    "skip_tokenizer_init": (False,),
    "task": ("auto", "generate"),
    "tensor_parallel_size": (1,),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
}


@dataclass(kw_only=True)
class SamplingParams:
    """How tokens are chosen, with vLLM's names and defaults; checked when made, and again when used.

    Raises:
        InvalidRequest (a ValueError): a value is out of range, or asks for what is not computed here.
        TypeError: there is no such parameter.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    #: None: it follows from the seed of the LLM and the number of the request.
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    #: None: as many as the model reads.
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Any = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    extra_args: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self.request("", 1)

    def request(self, prompt: str | list[int], room: int) -> GenerateRequest:
        """Our request for it; `room` is what `max_tokens=None` means. Raises InvalidRequest."""
        given = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _NOT_COMPUTED:
                given[item.name] = value
            elif value != item.default and value not in ([], {}):
                raise InvalidRequest(item.name, repr(value)[:80], f"{item.default!r}: nothing else is computed here")
        given["max_tokens"] = room if self.max_tokens is None else self.max_tokens
        return parse_request({"prompt": prompt, **{name: value for name, value in given.items() if value is not None}})


@dataclass
class Logprob:
    """The log probability of a token, its text, and its rank from 1 where that is known."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    #: The sum of the tokens' log probabilities; None where none were asked for.
    cumulative_logprob: float | None
    #: For each token, log probabilities by token id: its own, and those of the likeliest.
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Always true: only whole outputs are given."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What became of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: None = None
    finished: bool = True


class LLM:
    """A model and its engine in this process, gone with the process or with `close`.

    Args:
        model: as in HEADRACE_MODEL: `demo`, `gpt2`, ..., a hub id, a directory.
        tokenizer: the same as `model`, if given: a model's own is used.
        dtype: auto, float32 (float), bfloat16, float16 (half).
        seed: with the number of a request it makes the seed of those that have none.
        max_model_len: prompt and new tokens together; the model's if not given.
        max_num_seqs: sequences computed together.
        others: what vLLM's engine takes. What concerns its memory and speed changes nothing here.

    Raises:
        InvalidRequest (a ValueError): an argument asks for what is not computed here.
        TypeError: there is no such argument.
        ModelError, SettingsError: the model cannot be had, a setting is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        seed: int | None = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        **others: Any,
    ) -> None:
        _check_arguments(model, tokenizer, others)
        chosen = {"model": model, "dtype": _DTYPES.get(dtype, dtype)}
        sizes = {"max_context": max_model_len, "slots": max_num_seqs}
        settings = load_settings(**chosen, **{name: value for name, value in sizes.items() if value is not None})
        if not structlog.is_configured():  # else lines of the log would come between those that the script prints
            setup_logging(settings)
        self._engine = Engine.from_settings(settings)
        self._engine.start()
        self._seed = seed
        self._numbers = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode`, `decode`."""
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Compute prompts together, and give the outputs in their order.

        Args:
            prompts: a text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`, or a list of these.
            sampling_params: for all, or one for each prompt.
            use_tqdm: show a bar on a terminal.

        Raises:
            InvalidRequest (a ValueError): a prompt or a parameter cannot be computed.
            JobFailed: the model cannot compute a prompt: it is too long, say. The others are given up.
        """
        asked = [_prompt_of(item) for item in _as_list(prompts)]
        params = self._params_for(asked, sampling_params)
        requests = [self._request(prompt, chosen) for prompt, chosen in zip(asked, params, strict=True)]
        with self._submitted(requests) as futures:
            console = Console(stderr=True)
            shown = track(futures, "prompts", console=console, disable=not (use_tqdm and console.is_terminal))
            results = [future.result() for future in shown]
        return [_output(prompt, self._tokens(prompt), result) for prompt, result in zip(asked, results, strict=True)]

    @contextlib.contextmanager
    def _submitted(self, requests: list[GenerateRequest]) -> Iterator[list[Future[Result]]]:
        """The futures of the requests; those that are not done when the block ends are given up."""
        futures: list[Future[Result]] = []
        try:
            for request in requests:
                future = self._engine.submit(request, job_id=str(next(self._numbers)))
                futures.append(future)
                if future.done():
                    future.result()  # it was refused: say so before the others are computed
            yield futures
        finally:
            for future in futures:
                future.cancel()

    def _params_for(
        self, asked: list[Any], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * len(asked)
        if len(given) != len(asked):
            raise InvalidRequest("sampling_params", f"{len(given)} for {len(asked)} prompts", "one, or one for each")
        return list(given)

    def _request(self, prompt: str | list[int], params: SamplingParams) -> GenerateRequest:
        room = self._engine.max_context - len(self._tokens(prompt)) if params.max_tokens is None else 0
        request = params.request(prompt, max(1, room))
        if request.seed is None and self._seed is not None:
            digest = hashlib.blake2b(f"{self._seed} {next(self._numbers)}".encode(), digest_size=6).digest()
            request = request.model_copy(update={"seed": int.from_bytes(digest)})
        return request

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self._engine.tokenizer
        return tokenizer.encode(prompt) or ([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])


def _check_arguments(model: str, tokenizer: str | None, others: Mapping[str, Any]) -> None:
    if tokenizer not in (None, model):
        raise InvalidRequest("tokenizer", repr(tokenizer)[:80], "nothing: the model's own is used")
    for name, value in others.items():
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise InvalidRequest(name, repr(value)[:80], f"{' or '.join(map(repr, _ONLY[name]))}")
        elif name not in _IDLE:
            known = ["model", "tokenizer", "dtype", "seed", "max_model_len", "max_num_seqs", *_IDLE, *_ONLY]
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"LLM takes no argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _as_list(prompts: Any) -> list[Any]:
    """The prompts; a list of numbers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _prompt_of(item: Any) -> str | list[int]:
    if isinstance(item, Mapping):
        if "prompt_token_ids" in item:
            return list(item["prompt_token_ids"])
        if isinstance(item.get("prompt"), str):
            return str(item["prompt"])
        raise InvalidRequest("prompts", f"a mapping of {sorted(item)}", "one with prompt or prompt_token_ids")
    if isinstance(item, str):
        return item
    return list(item)


def _output(prompt: str | list[int], tokens: list[int], result: Result) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(result.id, text, tokens, [_completion(choice) for choice in result.choices])


def _completion(choice: Choice) -> CompletionOutput:
    scores = choice.logprobs
    return CompletionOutput(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        cumulative_logprob=None if scores is None else sum(score.logprob or 0.0 for score in scores),
        logprobs=None if scores is None else [_logprobs(score) for score in scores],
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def _logprobs(score: TokenLogprob) -> dict[int, Logprob]:
    found = {score.token_id: Logprob(score.logprob or 0.0, None, score.token)}
    for rank, top in enumerate(score.top, 1):
        found[top.token_id] = Logprob(top.logprob, rank, top.token)
    return found
