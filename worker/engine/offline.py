"""Offline inference with the names of vLLM: everything in this process, without Redis and without a queue.

from headrace.worker.engine.offline import LLM, SamplingParams

llm = LLM(model="demo")
for output in llm.generate(["Hello.", "The river"], SamplingParams(temperature=0, max_tokens=10)):
    print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import structlog
from rich.console import Console
from rich.progress import track

from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Result
from headrace.client.wire.values import is_missing, show, to_python
from headrace.config import Settings, load_settings
from headrace.config.logging import setup_logging
from headrace.config.settings import SettingsError
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.offline_adapters import LoRARequest, lora_requests
from headrace.worker.engine.offline_arguments import (
    ABSENT_METHODS,
    NEUTRAL_ARGUMENTS,
    NO_EFFECT,
    absent_method,
    unsupported,
)
from headrace.worker.engine.offline_prompts import (
    InvalidPrompt,
    Prompt,
    as_list,
    chats_of,
    prompt_of,
    refuse_options,
    rendered,
)
from headrace.worker.engine.offline_types import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
    output_of,
    refuse_unknown,
)
from headrace.worker.engine.requests import read_prompt

__all__ = [
    "LLM",
    "CompletionOutput",
    "InvalidPrompt",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

#: vLLM's names of types that have other names here.
_DTYPES = {"half": "float16", "float": "float32"}
#: Argument -> the setting that it sets.
_SETTINGS = {
    "model": "model",
    "dtype": "dtype",
    "device": "device",
    "max_model_len": "max_context",
    "max_num_seqs": "slots",
    "generation_config": "generation_config",
}


class LLM:
    """A model and its engine in this process, until `close` or the end of the process.

    Methods of vLLM's `LLM` that are not computed here raise NotImplementedError, which says what to use instead.

    Args:
        model: as in HEADRACE_MODEL: `demo`, `gpt2`, a hub id, a directory.
        tokenizer: None or the same as `model`: the model's own tokenizer is used.
        dtype: auto, float32 (float), bfloat16, float16 (half), or a torch dtype.
        seed: requests without a seed get one derived from this one and the number of the request. None or -1: random.
        max_model_len: limit of prompt and new tokens together; the model's by default.
        max_num_seqs: sequences computed at once.
        device: auto, cpu, cuda or cuda:N.
        generation_config: auto: `generate` without parameters uses those of the model's generation_config.json. none or
            vllm, the default: it does not.
        others: vLLM's other arguments. Those that concern memory and speed have no effect; others must have a value
            that asks for nothing, such as `tensor_parallel_size=1` or `quantization=None`.

    Raises:
        InvalidRequest (a ValueError): an argument has a value that is not supported.
        TypeError: there is no such argument.
        ModelError: the model cannot be loaded.
        SettingsError (a ValueError): a setting is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: Any = "auto",
        seed: int | None = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        device: str | None = None,
        generation_config: str | None = None,
        **others: Any,
    ) -> None:
        refuse_unknown("LLM", others, [*_SETTINGS, "tokenizer", "seed", *NEUTRAL_ARGUMENTS, *NO_EFFECT])
        if tokenizer not in (None, model):
            raise InvalidRequest("tokenizer", show(tokenizer), "nothing: the model's own is used")
        if "," in str(model):
            raise InvalidRequest("model", show(model), "one model; a worker can serve several")
        if (wrong := unsupported(others)) is not None:
            name, foreign = wrong
            raise InvalidRequest(name, show(others[name]), foreign.expected)
        self._seed = parse_request({"prompt": "", "seed": seed}).seed
        named = "auto" if dtype is None else str(dtype).removeprefix("torch.")
        settings = _settings(
            model=model,
            dtype=_DTYPES.get(named, named),
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            generation_config="none" if generation_config == "vllm" else generation_config,
        )
        if not structlog.is_configured():  # structlog's default prints log lines to stdout, among those of the script
            setup_logging(settings)
        self._engine = load_engine(settings)
        self._engine.start()
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

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses if it is given no parameters: with `generation_config="auto"`, the model's defaults."""
        defaults: dict[str, Any] = dict(self._engine.defaults)
        return SamplingParams(**defaults)

    def reset_prefix_cache(self) -> bool:
        """Does nothing: no result depends on the prefixes in the cache. Returns True, as vLLM does."""
        return True

    def reset_mm_cache(self) -> None:
        """Does nothing: GPT-2 reads text only, so there is no such cache."""

    def reset_encoder_cache(self) -> None:
        """Does nothing: GPT-2 has no encoder."""

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Compute prompts together. Returns their outputs in the same order.

        Args:
            prompts: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`, or a list of these.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar if stderr is a terminal.
            lora_request: a LoRA adapter for all prompts, or a list with one or None for each.
            priority: None, or a list of zeros.
            others: vLLM's other arguments, each None.

        Raises:
            InvalidRequest (a ValueError): a prompt or a parameter cannot be computed.
            InvalidPrompt (a ValueError and a JobFailed): the model cannot compute a prompt, for example because it is
                too long.
            JobFailed: a prompt failed. The others are cancelled.
        """
        refuse_options("generate", priority=priority, **others)
        return self._generate([prompt_of(item) for item in as_list(prompts)], sampling_params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Compute the answers to chats together. Returns their outputs in the same order.

        Args:
            messages: `[{"role": "user", "content": "Hello."}]`, or a list of such lists.
            sampling_params: for all chats, or one for each.
            use_tqdm: show a progress bar if stderr is a terminal.
            lora_request: a LoRA adapter for all prompts, or a list with one or None for each.
            chat_template: a template in jinja2; the model's own by default.
            add_generation_prompt: end the prompt with what begins an answer.
            continue_final_message: end the prompt with the last message, unfinished; no answer is begun then.
            chat_template_kwargs: further variables of the template.
            others: vLLM's other arguments, each None.

        Raises:
            InvalidRequest (a ValueError): the messages or a parameter are wrong.
            InvalidPrompt (a ValueError and a JobFailed): the model has no chat template, or it cannot write the
                messages, or the chat is too long.
            JobFailed: a chat failed. The others are cancelled.
        """
        if others.get("chat_template_content_format") in ("auto", "string"):  # what is computed
            del others["chat_template_content_format"]
        refuse_options("chat", priority=None, **others)
        asked = [
            rendered(
                self.get_tokenizer(),
                chat_template,
                each,
                variables=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
            )
            for each in chats_of(messages)
        ]
        return self._generate(asked, sampling_params, use_tqdm, lora_request)

    def _generate(
        self,
        asked: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: Any,
        lora_request: Any,
    ) -> list[RequestOutput]:
        params = _params_for(asked, sampling_params or self.get_default_sampling_params())
        adapters = lora_requests(lora_request, len(asked), self._engine.adapters)
        requests = [self._request(*each) for each in zip(asked, params, adapters, strict=True)]
        with self._submitted(requests) as futures:
            console = Console(stderr=True)
            shown = track(futures, "prompts", console=console, disable=not (use_tqdm and console.is_terminal))
            results = [future.result() for future in shown]
        return [
            output_of(prompt.text, self._tokens(prompt.content), result, adapter)
            for prompt, result, adapter in zip(asked, results, adapters, strict=True)
        ]

    @contextlib.contextmanager
    def _submitted(self, requests: list[GenerateRequest]) -> Iterator[list[Future[Result]]]:
        """The futures of the requests. Those that are not done when the block ends are cancelled."""
        futures: list[Future[Result]] = []
        try:
            for request in requests:
                future = self._engine.submit(request, job_id=str(next(self._numbers)))
                futures.append(future)
                if future.done() and isinstance(error := future.exception(), JobFailed):
                    # The engine refused it: raise before the others are computed.
                    raise InvalidPrompt(error.code, error.message, error.partial)
            yield futures
        finally:
            for future in futures:
                future.cancel()

    def _request(self, prompt: Prompt, params: SamplingParams, adapter: LoRARequest | None) -> GenerateRequest:
        room = self._engine.max_context - len(self._tokens(prompt.content))
        # Without room, the engine refuses the prompt and says why.
        request = params.request(prompt.content, max(1, room))
        if request.seed is None and self._seed is not None:
            digest = hashlib.blake2b(f"{self._seed} {next(self._numbers)}".encode(), digest_size=6).digest()
            request = request.model_copy(update={"seed": int.from_bytes(digest)})
        return request if adapter is None else request.model_copy(update={"adapter": adapter.lora_name})

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        engine = self._engine
        try:
            request = parse_request({"prompt": prompt})
            return read_prompt(request, engine.tokenizer, engine.ends, engine.parse_special_tokens)[0]
        except JobFailed as error:
            raise InvalidPrompt(error.code, error.message) from None


for _name, _instead in ABSENT_METHODS.items():
    setattr(LLM, _name, absent_method(_name, _instead))


def _settings(**arguments: Any) -> Settings:
    """The settings for arguments of `LLM`. Raises InvalidRequest, which names the argument, or SettingsError."""
    given = {name: value for name, value in arguments.items() if not is_missing(value)}
    try:
        return load_settings(**{_SETTINGS[name]: to_python(value) for name, value in given.items()})
    except SettingsError as error:
        for name, value in given.items():
            if str(error).startswith(f"HEADRACE_{_SETTINGS[name].upper()} is "):
                expected = Settings.model_fields[_SETTINGS[name]].description or ""
                raise InvalidRequest(name, show(value), expected) from None
        raise


def _params_for(asked: list[Prompt], given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * len(asked)
    if not isinstance(given, (list, tuple)) or not all(isinstance(item, SamplingParams) for item in given):
        raise InvalidRequest("sampling_params", f"a {type(given).__name__}", "SamplingParams, or a list of them")
    if len(given) != len(asked):
        raise InvalidRequest("sampling_params", f"{len(given)} for {len(asked)} prompts", "one, or one for each")
    return list(given)
