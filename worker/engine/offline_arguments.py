"""What vLLM's `LLM` takes beside the arguments that the offline engine computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from headrace.client.wire.foreign import NO_VALUE, Foreign, any_of, only
from headrace.client.wire.values import is_missing

_FLAG, _TEXT = any_of(bool, "True or False"), any_of(str, "text")
_LORA_ONLY = "LoRA is the only kind of adapter"
_ONE_PROCESS = "a model is computed whole, in one process"
_OWN_TOKENIZER = "the model's own tokenizer is used"
_PROPOSALS = "set HEADRACE_DRAFT_TOKENS and HEADRACE_DRAFT_MODEL; they change no result"
_NO_IMAGES = "GPT-2 reads text only"
_OWN_FILES = "the files of the model decide"

#: Arguments that concern memory and speed, never results. They have no effect, whatever the value.
NO_EFFECT = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "disable_async_output_proc",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_logprobs",
        "max_long_partial_prefills",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "num_gpu_blocks_override",
        "num_scheduler_steps",
        "optimization_level",
        "preemption_mode",
        "prefix_caching_hash_algo",
        "scheduling_policy",
        "served_model_name",
        "swap_space",
        "trust_remote_code",
        "use_tqdm_on_load",
        "use_v2_block_manager",
    }
)

#: Argument -> the values that ask for nothing. Any other value is refused: it would change results.
NEUTRAL_ARGUMENTS: dict[str, Foreign] = {
    "tensor_parallel_size": only(1, advice=_ONE_PROCESS),
    "pipeline_parallel_size": only(1, advice=_ONE_PROCESS),
    "data_parallel_size": only(1, advice=_ONE_PROCESS),
    "decode_context_parallel_size": only(1, advice=_ONE_PROCESS),
    "enable_expert_parallel": only(False, advice=_ONE_PROCESS),
    "quantization": NO_VALUE._replace(advice="use dtype='int8' on an x86-64 CPU"),
    "kv_cache_dtype": only("auto", advice="it is dtype"),
    "load_format": only("auto", "safetensors", advice="the format is told from the files"),
    "revision": NO_VALUE._replace(advice="download the revision, and give its directory as model"),
    "code_revision": NO_VALUE,
    "tokenizer_revision": NO_VALUE._replace(advice=_OWN_TOKENIZER),
    "tokenizer_mode": only("auto", "hf", "slow", advice=_OWN_TOKENIZER),
    "skip_tokenizer_init": only(False, advice=_OWN_TOKENIZER),
    "config_format": only("auto", "hf", advice=_OWN_FILES),
    "hf_config_path": NO_VALUE._replace(advice=_OWN_FILES),
    "hf_overrides": only({}, advice=_OWN_FILES),
    "hf_token": NO_VALUE._replace(advice="set HF_TOKEN"),
    "download_dir": NO_VALUE._replace(advice="set HF_HOME"),
    "ignore_patterns": any_of((str, list), "patterns"),
    "model_loader_extra_config": only({}, advice=_OWN_FILES),
    "rope_scaling": only({}, advice="GPT-2 has learned positions"),
    "rope_theta": NO_VALUE._replace(advice="GPT-2 has learned positions"),
    "disable_sliding_window": _FLAG,
    "model_impl": only("auto", "vllm"),
    "task": only("auto", "generate", advice="the model generates text"),
    "runner": only("auto", "generate", advice="the model generates text"),
    "convert": only("auto", "none", advice="the model generates text"),
    "override_generation_config": only({}, advice="give SamplingParams"),
    "enable_lora": _FLAG,
    "fully_sharded_loras": _FLAG,
    "max_loras": any_of(int, "a number"),
    "max_lora_rank": any_of(int, "a number"),
    "max_cpu_loras": any_of(int, "a number"),
    "lora_dtype": _TEXT,
    "enable_prompt_adapter": only(False, advice=_LORA_ONLY),
    "enable_prompt_embeds": only(False, advice="prompts are text or token ids"),
    "speculative_config": NO_VALUE._replace(
        advice="set HEADRACE_DRAFT_TOKENS and HEADRACE_DRAFT_MODEL; they change no result"
    ),
    "speculative_model": NO_VALUE._replace(
        advice="set HEADRACE_DRAFT_TOKENS and HEADRACE_DRAFT_MODEL; they change no result"
    ),
    "num_speculative_tokens": NO_VALUE._replace(
        advice="set HEADRACE_DRAFT_TOKENS and HEADRACE_DRAFT_MODEL; they change no result"
    ),
    "limit_mm_per_prompt": only({}, advice=_NO_IMAGES),
    "mm_processor_kwargs": only({}, advice=_NO_IMAGES),
    "allowed_local_media_path": only("", advice=_NO_IMAGES),
    "allowed_media_domains": only([], advice=_NO_IMAGES),
    "guided_decoding_backend": _TEXT,
    "structured_outputs_config": only({}),
    "logits_processors": only([], advice="use logit_bias"),
    "pooler_config": NO_VALUE,
    "override_pooler_config": NO_VALUE,
    "kv_transfer_config": NO_VALUE,
    "additional_config": only({}),
    "enable_sleep_mode": only(False, advice="close() frees the memory"),
    "worker_cls": only("auto"),
    "worker_extension_cls": only(""),
}

#: Method of vLLM's `LLM` -> what is offered instead.
ABSENT_METHODS = {
    "beam_search": "use generate with n samples, and choose among them by cumulative_logprob",
    "encode": "hidden states are in headrace validate and in Job.checkpoints; get_tokenizer().encode gives token ids",
    "embed": "the model generates text; hidden states are in Job.checkpoints",
    "classify": "the model generates text; compare the log probabilities of the labels with generate and logprobs",
    "score": "the model generates text; headrace.client scores a text with Client.score",
    "reward": "the model generates text; use generate with logprobs",
    "apply_model": "headrace.model.load_model gives the module itself",
    "collective_rpc": "there are no worker processes; headrace.model.load_model gives the module itself",
    "set_tokenizer": "the model's own tokenizer is used",
    "preprocess_chat": "use chat",
    "enqueue": "use generate, or submit jobs with headrace.client",
    "wait_for_completion": "use generate, or submit jobs with headrace.client",
    "sleep": "close() frees the memory",
    "wake_up": "make another LLM",
    "start_profile": "profile the process itself, for example with py-spy",
    "stop_profile": "profile the process itself, for example with py-spy",
    "get_metrics": "a worker has metrics, HEADRACE_METRICS_PORT",
    "init_weight_transfer_engine": "make another LLM with the new weights",
    "start_weight_update": "make another LLM with the new weights",
    "finish_weight_update": "make another LLM with the new weights",
    "enqueue_chat": "use chat",
    "update_weights": "make another LLM with the new weights",
}


def unsupported(given: Mapping[str, Any]) -> tuple[str, Foreign] | None:
    """The first argument whose value asks for something that is not computed, with what is accepted; None if none."""
    for name, value in given.items():
        foreign = NEUTRAL_ARGUMENTS.get(name)
        if foreign is not None and not is_missing(value) and not foreign.is_neutral(value, given):
            return name, foreign
    return None


def absent_method(name: str, instead: str) -> Callable[..., NoReturn]:
    """A method that raises NotImplementedError and says what to use instead."""

    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"LLM.{name} is not computed here: {instead}")

    method.__name__ = name
    method.__doc__ = f"Not computed: {instead}."
    return method
