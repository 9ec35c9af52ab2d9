"""Builds an engine from the settings: loads the model, sizes the key-value cache, tests batch invariance."""

from __future__ import annotations

import gc
import hashlib
import os
import threading
from concurrent.futures import Future

import structlog
import torch

from headrace import __version__
from headrace.config import Settings
from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.generation_config import Ends, read_ends, sampling_defaults, unapplied_defaults
from headrace.model.gguf_file import raw_config
from headrace.model.hub import ModelError, config_path, find_model
from headrace.model.kernels import isa
from headrace.model.kernels.attention import decode_kernel
from headrace.model.kernels.sampling import sampling_works
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.model.trusted_files import check_not_shared, unchanged
from headrace.model.weights import load_model
from headrace.worker.engine.cache_slots import SlotTable, length_classes
from headrace.worker.engine.cgroups import free_memory
from headrace.worker.engine.description import describe
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.request_defaults import NO_DEFAULTS, Defaults
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.self_test import is_batch_invariant

log = structlog.get_logger("headrace.engine")

#: Share of the free memory that the cache may take if HEADRACE_KV_CACHE_BYTES is not set.
CACHE_SHARE = 0.25
#: Variables by which the libraries choose other machine code, and with it other last bits of the results.
MACHINE_CODE_VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_OPT",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def load_engine(settings: Settings, name: str | None = None) -> Engine:
    """Load a model of the settings, the first one by default, and build an engine for it. The engine is not started.

    Raises:
        ModelError: the model cannot be found, read or trusted, or this machine lacks the instruction set that the
            settings name.
        ValueError: the model's share of the cache budget does not hold one sequence.
    """
    loaded: Future[Engine] = Future()

    def load() -> None:
        try:
            loaded.set_result(build_engine(settings, name))
        except BaseException as error:
            loaded.set_exception(error)

    # Loading computes, and OpenMP creates a team of threads for every thread that computes. When all teams together
    # have more threads than there are cores, waiting threads sleep instead of spinning: an engine's thread was measured
    # 1.6 times slower if the main thread had computed before. So a thread that ends loads the model; its team ends too.
    threading.Thread(target=load, name="headrace-load", daemon=True).start()
    return loaded.result()


def build_engine(settings: Settings, name: str | None = None) -> Engine:
    """Like `load_engine`, in the caller's thread. Raises ModelError and ValueError like `load_engine`."""
    try:
        isa.use(settings.cpu_isa)
    except isa.IsaError as error:
        raise ModelError(str(error)) from error
    name = name or settings.model_name
    source, parts = settings.models[name], len(settings.models)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shared = settings.allow_shared_model
    folder = find_model(source)
    applied = settings.generation_config == "auto"
    if not shared:
        check_not_shared(folder)
    with unchanged(folder):
        model = load_model(folder, device=settings.device, dtype=settings.dtype, allow_shared=shared)
        tokenizer = load_tokenizer(folder, allow_shared=shared)
        check_vocabulary(source, model.config, tokenizer)
        ends = read_ends(folder, raw_config(config_path(folder)), tokenizer, model.config.vocab_size)
        defaults = sampling_defaults(folder) if applied else {}
        unused = () if applied else unapplied_defaults(folder)
    max_context = min(settings.max_context or model.config.n_positions, model.config.n_positions)
    lengths = length_classes(max_context)
    runner = ModelRunner(model, lengths)
    if settings.kv_cache_bytes:
        budget = settings.kv_cache_bytes // parts
    else:
        budget = default_budget(settings.slots * lengths[-1] * runner.position_bytes, model.device, parts)
    invariant = is_batch_invariant(model)
    scheduler = Scheduler(
        SlotTable(lengths, position_bytes=runner.position_bytes, budget_bytes=budget),
        max_rows=settings.slots,
        step_tokens=settings.step_tokens,
        prefill_chunk=settings.prefill_chunk,
        # Otherwise a proposed token could change the last bits of other rows, or cost as much as a row of its own.
        draft_tokens=settings.draft_tokens if invariant and runner.takes_proposed_tokens else 0,
    )
    engine = Engine(
        runner,
        tokenizer,
        scheduler,
        model_name=name,
        vocab_size=model.config.vocab_size,
        max_context=max_context,
        ends=ends,
        parse_special_tokens=settings.parse_special_tokens,
        defaults=defaults,
        description=describe(model, tokenizer, ends, max_context=max_context, defaults=defaults, notes=unused),
        fingerprint=fingerprint(
            model, tokenizer, ends, settings.prefill_chunk, invariant, defaults, settings.parse_special_tokens
        ),
    )
    log.info(
        "model.loaded",
        model=name,
        fingerprint=engine.fingerprint,
        cache_bytes=budget,
        **engine.description.log_fields(),
    )
    return engine


def find_files(settings: Settings, name: str) -> None:
    """Check that the directory of a model exists and that not everybody can write it. Raises ModelError."""
    folder = find_model(settings.models[name])
    if not settings.allow_shared_model:
        check_not_shared(folder)


def release_memory() -> None:
    """Free the memory of engines that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_budget(wanted: int, device: torch.device, parts: int = 1) -> int:
    """Default size of the key-value cache of one of `parts` models, in bytes.

    Args:
        wanted: bytes that all slots take at full length.
        device: whose free memory limits the size to CACHE_SHARE / parts of it.
        parts: models of this process, which share the memory equally.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return min(wanted, int(free * CACHE_SHARE / parts))


def check_vocabulary(name: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ModelError if the tokenizer has more tokens than the embedding has rows. It may have fewer (padding)."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"model {name!r}: its tokenizer has {tokenizer.vocab_size} tokens and its embedding {config.vocab_size}; "
            "if tokens were added, call model.resize_token_embeddings(len(tokenizer)) and save the model again; else "
            "put the vocabulary it was trained with (vocab.json and merges.txt) into its directory"
        )


def fingerprint(
    model: Decoder,
    tokenizer: Tokenizer,
    ends: Ends,
    prefill_chunk: int,
    invariant: bool,
    defaults: Defaults = NO_DEFAULTS,
    parse_special_tokens: bool | None = None,
) -> str:
    """Identify what results depend on besides prompt, parameters and seed. Equal fingerprints mean equal results."""
    device = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    parts = (
        f"headrace-{__version__}",
        f"torch-{torch.__version__}",
        device.replace(" ", "-"),
        str(model.dtype).removeprefix("torch."),
        f"threads-{torch.get_num_threads()}",
        f"kernels-{isa.chosen().name}",
        f"products-{model.gemm_backend}",
        f"attention-{'compiled' if decode_kernel(model.config.head_dim, model.dtype, model.device.type) else 'torch'}",
        f"sampling-{'compiled' if sampling_works(model.device.type, model.dtype) else 'torch'}",
        f"chunk-{prefill_chunk}",
        f"weights-{model.digest[:12] or 'unknown'}",
        f"config-{hashlib.sha256(repr(model.config).encode()).hexdigest()[:8]}",
        f"vocabulary-{tokenizer.digest[:12] or 'unknown'}",
        f"ends-{ends.digest[:8]}",
        f"prompts-{_prompts_digest(tokenizer, parse_special_tokens)[:8]}",
        *([f"defaults-{hashlib.sha256(repr(sorted(defaults.items())).encode()).hexdigest()[:8]}"] if defaults else []),
        *([f"environment-{variables}"] if (variables := _variables_digest()) else []),
        "batch-invariant" if invariant else "batch-dependent",
    )
    return "/".join(parts)


def _variables_digest() -> str:
    """A short hash of the variables in MACHINE_CODE_VARIABLES; empty if none is set, as usual."""
    found = [(name, value) for name in MACHINE_CODE_VARIABLES if (value := os.environ.get(name))]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:8] if found else ""


def _prompts_digest(tokenizer: Tokenizer, parse: bool | None) -> str:
    """A hash of what becomes of messages, and of special tokens in the text of a prompt."""
    template, parse = tokenizer.chat_template, tokenizer.parses_special_tokens if parse is None else parse
    named = [] if template is None else sorted(tokenizer.special_tokens.items())  # which only templates read
    return hashlib.sha256(repr((template, named, parse)).encode()).hexdigest()
