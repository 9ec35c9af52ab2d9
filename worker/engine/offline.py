"""Offline inference with the names of vLLM: everything in this process, without Redis and without a queue.

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self

import structlog
from rich.console import Console
from rich.progress import track

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Choice, Result, TokenLogprob
from headrace.config import load_settings
from headrace.config.logging import setup_logging
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.build import load_engine

#: vLLM's names of types that have other names here.
_DTYPES = {"half": "float16", "float": "float32"}
#: Arguments of vLLM's `LLM` that are accepted and have no effect: they concern its memory and speed, never its results.
_NO_EFFECT = {
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


@dataclass(kw_only=True)
class SamplingParams:
    """How tokens are sampled, with vLLM's names and defaults.

    Raises:
        InvalidRequest (a ValueError): a value is out of range.
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
    #: None: derived from the seed of the LLM and the number of the request.
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    #: None: as many as the model's context has room for.
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None

    def __new__(cls, **params: Any) -> Self:
        """Refuse unknown parameters before the generated `__init__` does, with the name that was probably meant."""
        _refuse_unknown(cls.__name__, params, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.request("", 1)

    def request(self, prompt: str | list[int], room: int) -> GenerateRequest:
        """The engine's request for a prompt.

        Args:
            prompt: text or token ids.
            room: the number of new tokens if `max_tokens` is None.

        Raises:
            InvalidRequest: a value is out of range.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given["max_tokens"] = room if self.max_tokens is None else self.max_tokens
        return parse_request({"prompt": prompt, **{name: value for name, value in given.items() if value is not None}})


@dataclass
class Logprob:
    """Log probability of a token, and its rank from 1 if it is among the likeliest."""

    logprob: float
    rank: int | None = None
    #: The token's text, or all of its bytes (`bytes:` and hexadecimal) if it is only part of a character.
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    #: Sum of the tokens' log probabilities; None if `logprobs` is None.
    cumulative_logprob: float | None
    #: For each token, log probabilities by token id: its own and those of the likeliest tokens.
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Always true: `generate` returns finished outputs only."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """The samples of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: None = None
    finished: bool = True


class LLM:
    """A model and its engine in this process, until `close` or the end of the process.

    Args:
        model: as in HEADRACE_MODEL: `demo`, `gpt2`, a hub id, a directory.
        tokenizer: None or the same as `model`: the model's own tokenizer is used.
        dtype: auto, float32 (float), bfloat16, float16 (half).
        seed: requests without a seed get one derived from this one and the number of the request. None: random.
        max_model_len: limit of prompt and new tokens together; the model's by default.
        max_num_seqs: sequences computed at once.
        tensor_parallel_size: must be 1.
        others: arguments of vLLM that concern its memory and speed. They have no effect.

    Raises:
        InvalidRequest (a ValueError): an argument has a value that is not supported.
        TypeError: there is no such argument.
        ModelError: the model cannot be loaded.
        SettingsError: a setting is wrong.
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
        tensor_parallel_size: int = 1,
        **others: Any,
    ) -> None:
        known = ["model", "tokenizer", "dtype", "seed", "max_model_len", "max_num_seqs", "tensor_parallel_size"]
        _refuse_unknown("LLM", others, [*known, *_NO_EFFECT])
        if tokenizer not in (None, model):
            raise InvalidRequest("tokenizer", repr(tokenizer)[:80], "nothing: the model's own is used")
        if tensor_parallel_size != 1:
            raise InvalidRequest(
                "tensor_parallel_size", repr(tensor_parallel_size)[:80], "1: a model is computed whole"
            )
        chosen = {"model": model, "dtype": _DTYPES.get(dtype, dtype)}
        sizes = {"max_context": max_model_len, "slots": max_num_seqs}
        settings = load_settings(**chosen, **{name: value for name, value in sizes.items() if value is not None})
        if not structlog.is_configured():  # structlog's default prints log lines to stdout, among those of the script
            setup_logging(settings)
        self._engine = load_engine(settings)
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
        """Compute prompts together. Returns their outputs in the same order.

        Args:
            prompts: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`, or a list of these.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar if stderr is a terminal.

        Raises:
            InvalidRequest (a ValueError): a prompt or a parameter cannot be computed.
            JobFailed: the model cannot compute a prompt, for example because it is too long. The others are cancelled.
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
        """The futures of the requests. Those that are not done when the block ends are cancelled."""
        futures: list[Future[Result]] = []
        try:
            for request in requests:
                future = self._engine.submit(request, job_id=str(next(self._numbers)))
                futures.append(future)
                if future.done():
                    future.result()  # the engine refused it: raise before the others are computed
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


def _refuse_unknown(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for the first name that is not known, with the nearest known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"{function} takes no argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts. A list of numbers is one prompt."""
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
