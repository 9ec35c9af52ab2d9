"""What each setting does, in Markdown: the page of settings is made from this table and from `Settings`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SettingHelp:
    """The documentation of one setting.

    Attributes:
        text: what the setting does, and why one would change it.
        default: the default in words, if the value itself is None.
        vllm: the name of the same thing in vLLM, if it has one.
    """

    text: str
    default: str = ""
    vllm: str = ""


#: Heading -> setting -> its documentation, in the order of the page.
HELP: dict[str, dict[str, SettingHelp]] = {
    "The model, and where it runs": {
        "model": SettingHelp(
            "A GPT-2 size, a hub id, a directory with `config.json` and `model.safetensors`, or a [GGUF "
            "file](how-to/convert.md#gguf-without-converting); or [several models](deployment.md#several-models). Jobs "
            "that name no model go to the first. A path begins with `/`, `.` or `~`. Clients take only the name from "
            "it, without looking at the file system.",
            vllm="model",
        ),
        "served_name": SettingHelp(
            "The name of the model in results and of its queue, `headrace.<name>`. Set it if two directories have "
            "the same name, or if a new version is to take over the queue of the old one.",
            default="the last part of the path, or `org-name` for a hub id `org/name`",
            vllm="served_model_name",
        ),
        "adapters": SettingHelp(
            "LoRA adapters in PEFT's format that are loaded with their model and stay loaded: `NAME=DIRECTORY`, "
            "separated by commas; `MODEL/NAME=DIRECTORY` if the worker serves several models. A job names one with "
            "`adapter`. A worker does not start with an adapter that cannot be loaded.",
            default="none",
            vllm="lora_modules",
        ),
        "adapters_dir": SettingHelp(
            "A directory with further adapters, a directory each, whose name is that of the adapter; if the worker "
            "serves several models, in a directory of the model's name. An adapter is loaded when a job first names "
            "it, and unloaded when `HEADRACE_ADAPTER_BYTES` needs its memory. If its files are replaced, new jobs use "
            "the new ones.",
            default="none",
            vllm="VLLM_LORA_RESOLVER_CACHE_DIR",
        ),
        "adapter_bytes": SettingHelp(
            "Memory for adapters, divided equally among the models of the worker. The least recently used one of "
            "`HEADRACE_ADAPTERS_DIR` that no job uses is unloaded first; a job waits until there is room for its own.",
            vllm="max_cpu_loras",
        ),
        "redis_url": SettingHelp(
            "The Redis that clients and workers share.",
            default="the embedded server if it runs, else `redis://localhost:6379/0`",
        ),
        "redis_unsuitable": SettingHelp(
            "What to do with a Redis that loses jobs: one that evicts keys (a `maxmemory-policy` other than "
            "`noeviction`), one in cluster mode, or one older than 6.2. `refuse`: clients raise `RedisUnsuitable` and "
            "workers do not start, with the line to change. `allow`: workers log it and start.",
        ),
        "signing_key": SettingHelp(
            "If set, workers compute only jobs that are signed with it. With several keys, workers accept "
            "all of them and clients sign with the first.",
            default="none: jobs are not signed",
        ),
        "device": SettingHelp(
            "`auto` takes a GPU if there is one, else the CPU.",
            vllm="device",
        ),
        "dtype": SettingHelp(
            "`auto` is float32 on a CPU and bfloat16 on a GPU. `int8` needs an x86-64 CPU with AVX2.",
            vllm="dtype",
        ),
        "generation_config": SettingHelp(
            "`auto`: the worker takes the parameters that a request does not set (`temperature`, `top_k`, `top_p`, "
            "`min_p`, `repetition_penalty`, `max_new_tokens`) from the model's `generation_config.json`, and results "
            "name them in `defaults`. `none`: only its `eos_token_id` and `bos_token_id` are read. In vLLM `auto` is "
            "the default.",
            vllm="generation_config",
        ),
        "parse_special_tokens": SettingHelp(
            "Whether the names of special tokens in a text prompt, such as `<|endoftext|>`, mean these tokens, in "
            "requests that do not set [`parse_special_tokens`](client.md#special-tokens). Turn it off if prompts "
            "come from people who must not end or open a turn. Chats are not affected: a template writes such names.",
            default="1 for a model that brings its own tokenizer, 0 for GPT-2's",
        ),
        "allow_shared_model": SettingHelp(
            "A worker refuses a model whose directory or files every user of the machine can write (`o+w`), because "
            "they could change what it answers. 1 allows it, for a machine or container without other users.",
        ),
    },
    "How much is computed at once": {
        "slots": SettingHelp(
            "Samples of a model that are computed together. More slots raise the throughput while the cache has "
            "room; each sample then waits longer for its next token.",
            vllm="max_num_seqs",
        ),
        "max_context": SettingHelp(
            "Prompt and new tokens together; a job that needs more is refused.",
            default="the positions of the model",
            vllm="max_model_len",
        ),
        "kv_cache_bytes": SettingHelp(
            "Memory for the KV cache, divided equally among the models of the worker. A sample takes what its "
            "length needs, and waits until there is room.",
            default="all slots at full length, but at most a quarter of the memory that is free when a model is loaded",
            vllm="kv_cache_memory_bytes",
        ),
        "threads": SettingHelp(
            "CPU threads of the engine; part of the fingerprint. Divide the cores among several workers on one "
            "machine.",
            default="torch's choice: the physical cores",
        ),
        "cpu_isa": SettingHelp(
            "Instruction set of the compiled kernels, from the best one down: Intel AMX, AVX-512 with and without "
            "VNNI, AVX2, NEON (ARM), and none (torch's operators). A lower one than the CPU's is for tests and "
            "comparisons; one that the CPU lacks is refused.",
            default="auto: the best one of the CPU",
        ),
        "step_tokens": SettingHelp(
            "Tokens of one forward pass. It bounds how long a running sample waits while a prompt is computed.",
            vllm="max_num_batched_tokens",
        ),
        "prefill_chunk": SettingHelp(
            "Chunked prefill: tokens of a prompt that are computed at a time. Where torch computes attention, another "
            "value may change the last bits of a result, and it is part of the fingerprint.",
            vllm="long_prefill_token_threshold",
        ),
        "prefix_cache": SettingHelp(
            "Whether the beginning of a prompt, in whole chunks, stays in the KV cache after its job, in memory that "
            "no running sample needs. The next prompt that begins with it is answered sooner; `usage` says how many "
            "tokens were reused, and no text depends on it. 0: prompts share a beginning only while one of them runs.",
            vllm="enable_prefix_caching",
        ),
        "draft_tokens": SettingHelp(
            "Speculative decoding from n-grams of the text (prompt lookup) and from a draft model: tokens proposed at "
            "a time while few samples run; 0 turns it off. No result depends on it.",
            vllm="num_speculative_tokens",
        ),
        "draft_model": SettingHelp(
            "A small model with the same tokenizer, named as in `HEADRACE_MODEL`, that proposes tokens while at most "
            "four samples run: a [draft model](how-it-works.md#a-draft-model). Its cache counts towards "
            "`HEADRACE_KV_CACHE_BYTES`. No result depends on it.",
            default="none: only n-grams propose tokens",
            vllm="speculative_config",
        ),
        "idle_unload_s": SettingHelp(
            "If the worker serves several models: a model without jobs is unloaded after this many seconds, and "
            "loaded again for its next job. 0: never; above 0 only the first model is loaded at the start.",
        ),
    },
    "How long jobs and results are kept": {
        "max_queue": SettingHelp(
            "Jobs in a queue; beyond it `submit` raises `QueueFull`.",
        ),
        "max_result_bytes": SettingHelp(
            "Largest result that a client may ask for: `n` x tokens x (16 + 80 for each log probability) bytes. "
            "Reading a result takes about ten times its size in memory.",
        ),
        "result_ttl_s": SettingHelp(
            "How long a result is kept after it was stored, and a job's record after it was written.",
        ),
        "events_ttl_s": SettingHelp(
            "How long the events of a streamed job are kept after the last one. The result contains the whole "
            "text too.",
        ),
        "checkpoint_ttl_s": SettingHelp(
            "How long checkpoint tensors are kept.",
        ),
        "checkpoint_max_bytes": SettingHelp(
            "Largest size of one job's checkpoint tensors; 0 refuses them. All tensors of GPT-2 124M at 1,024 "
            "tokens are 330 MB, of which the logits are 206 MB.",
        ),
    },
    "Failures and shutdown": {
        "lease_s": SettingHelp(
            "A worker that has not renewed its leases for this long loses its jobs to another. A shorter lease "
            "finds a dead worker sooner; the jobs of a worker that is only slow are then computed twice.",
        ),
        "max_attempts": SettingHelp(
            "A job that was started this often, and whose worker process ended each time, fails with `max_attempts`.",
        ),
        "soft_shutdown_s": SettingHelp(
            "How long running jobs may continue after SIGQUIT before they return to the queue.",
        ),
        "stall_s": SettingHelp(
            "An engine that spends longer in one step is stalled: `headrace status` fails, the worker takes no "
            "more messages, and its jobs go to other workers.",
        ),
    },
    "The HTTP server": {
        "api_keys": SettingHelp(
            "`headrace serve` answers requests that carry one of these keys.",
            default="none: it answers only this machine",
            vllm="api_key",
        ),
        "files_dir": SettingHelp(
            "Where `headrace serve` keeps uploaded files and batches.",
            default="`$XDG_DATA_HOME/headrace`, else `~/.local/share/headrace`",
        ),
    },
    "Probes, metrics, traces and logs": {
        "metrics_port": SettingHelp(
            "The port where the worker answers `/livez`, `/readyz` and `/metrics`.",
        ),
        "metrics_host": SettingHelp(
            "The address on which the worker listens on this port.",
        ),
        "otel": SettingHelp(
            "1: workers and commands configure OpenTelemetry from the `OTEL_*` variables and send spans; see "
            "[Traces](deployment.md#traces). If a program has set up OpenTelemetry itself, spans are sent in any case.",
        ),
        "log_level": SettingHelp(
            "Prompts and generated text are not logged at any level.",
        ),
        "log_format": SettingHelp(
            "`auto` is `console` on a terminal, else `json`.",
        ),
    },
}
