"""Builds an engine from the settings: loads the model, sizes the key-value cache, tests batch invariance."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from headrace.config import Settings
from headrace.model.adapters.lora import load_adapter
from headrace.model.adapters.packed import PackedAdapter
from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.generation_config import read_ends, sampling_defaults, unapplied_defaults
from headrace.model.gguf_file import raw_config
from headrace.model.hub import ModelError, config_path, find_model
from headrace.model.kernels import isa
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.model.trusted_files import check_not_shared, unchanged
from headrace.model.weights import load_model, read_config
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.cache_slots import SlotTable, length_classes
from headrace.worker.engine.cgroups import free_memory
from headrace.worker.engine.description import describe
from headrace.worker.engine.draft_model import DraftModel
from headrace.worker.engine.draft_proposer import DRAFTED_SEQUENCES, DraftProposer
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.fingerprint import fingerprint
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.self_test import is_batch_invariant

log = structlog.get_logger("headrace.engine")

#: Share of the free memory that the cache may take if HEADRACE_KV_CACHE_BYTES is not set.
CACHE_SHARE = 0.25

T = TypeVar("T")


def load_engine(settings: Settings, name: str | None = None) -> Engine:
    """Load a model of the settings, the first one by default, and build an engine for it. The engine is not started.

    Raises:
        ModelError: the model cannot be found, read or trusted, or this machine lacks the instruction set that the
            settings name.
        ValueError: the model's share of the cache budget does not hold one sequence.
    """
    return in_own_thread(lambda: build_engine(settings, name))


def in_own_thread(load: Callable[[], T]) -> T:
    """Load something in a thread that ends afterwards, and wait for it.

    Loading computes, and OpenMP creates a team of threads for every thread that computes. When all teams together have
    more threads than there are cores, waiting threads sleep instead of spinning: an engine's thread was measured 1.6
    times slower if the main thread had computed before. The team of a thread that ends, ends too.
    """
    loaded: Future[T] = Future()

    def run() -> None:
        try:
            loaded.set_result(load())
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=run, name="headrace-load", daemon=True).start()
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
    # Otherwise a proposed token could change the last bits of other rows, or cost as much as a row of its own.
    draft_tokens = settings.draft_tokens if invariant and runner.takes_proposed_tokens else 0
    draft = load_draft_model(settings, model, tokenizer, max_context) if draft_tokens else None
    if settings.draft_model is not None and draft is None:
        log.warning("draft.unused", model=settings.draft_model)
    if draft is not None:
        budget = budget_beside(draft, budget, lengths[-1] * runner.position_bytes)
    scheduler = Scheduler(
        SlotTable(
            lengths,
            position_bytes=runner.position_bytes,
            budget_bytes=budget,
            prefixes=PrefixCache(settings.prefill_chunk if settings.prefix_cache else 0),
        ),
        max_rows=settings.slots,
        step_tokens=settings.step_tokens,
        prefill_chunk=settings.prefill_chunk,
        draft_tokens=draft_tokens,
        drafts=DraftProposer(draft) if draft is not None else None,
    )
    adapters = adapters_of(settings, name, model)
    try:
        check_adapters_dir(settings)
        adapters.load_named()
    except ModelError:
        if not settings.idle_unload_s:  # else `find_files` has looked at them, and they were replaced since then
            raise
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
        adapters=adapters,
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


def load_draft_model(settings: Settings, model: Decoder, tokenizer: Tokenizer, max_context: int) -> DraftModel | None:
    """The draft model of the settings, with its cache; None if they name none, or if it cannot be used on this machine.

    Raises ModelError if it cannot be loaded, or if its vocabulary is not that of `model`.
    """
    source = settings.draft_model
    if source is None:
        return None
    shared, folder = settings.allow_shared_model, _trusted_folder(settings, source)
    with unchanged(folder):
        small = load_model(folder, device=settings.device, dtype=settings.dtype, allow_shared=shared)
        its_tokenizer = load_tokenizer(folder, allow_shared=shared)
    if (small.config.vocab_size, its_tokenizer.digest) != (model.config.vocab_size, tokenizer.digest):
        raise ModelError(
            f"HEADRACE_DRAFT_MODEL is {source!r}, which has another vocabulary ({small.config.vocab_size} tokens) than "
            f"HEADRACE_MODEL ({model.config.vocab_size} tokens). Name a model with the same tokenizer files, or unset "
            "HEADRACE_DRAFT_MODEL"
        )
    draft = DraftModel(small, length=min(max_context, small.config.n_positions), slots=DRAFTED_SEQUENCES)
    if not draft.works:
        return None
    log.info("draft.loaded", model=source, parameters=small.parameters, cache_bytes=draft.cache_bytes)
    return draft


def budget_beside(draft: DraftModel, budget: int, least: int) -> int:
    """What a draft model's cache leaves of the cache's budget. Raises ValueError if that is less than one sequence."""
    left = budget - draft.cache_bytes
    if left < least <= budget:
        raise ValueError(
            f"the cache of HEADRACE_DRAFT_MODEL takes {draft.cache_bytes} of the {budget} bytes of "
            f"HEADRACE_KV_CACHE_BYTES, and one sequence needs {least}. Raise it, lower HEADRACE_MAX_CONTEXT, or unset "
            "HEADRACE_DRAFT_MODEL"
        )
    return left


def adapters_of(settings: Settings, name: str, model: Decoder) -> Adapters:
    """The adapters of a served model. None is loaded yet."""

    def load(folder: Path) -> PackedAdapter:
        return model.pack_adapter(load_adapter(folder, model.config, allow_shared=settings.allow_shared_model))

    return Adapters(
        lambda folder: in_own_thread(lambda: load(folder)),
        named=settings.adapters_of(name),
        folder=settings.adapters_dir_of(name),
        budget_bytes=settings.adapter_bytes // len(settings.models),
        reserved=settings.models,
    )


def find_files(settings: Settings, name: str) -> None:
    """Check that the directories of a model and of the draft model exist and that not everybody can write them.

    Checks the model's adapters, too. Raises ModelError.
    """
    folder, shared = _trusted_folder(settings, settings.models[name]), settings.allow_shared_model
    if settings.draft_model is not None:
        _trusted_folder(settings, settings.draft_model)
    check_adapters_dir(settings)
    for adapter, place in settings.adapters_of(name).items():
        try:
            load_adapter(place, read_config(config_path(folder)), allow_shared=shared)
        except ModelError as error:
            raise ModelError(f"HEADRACE_ADAPTERS: adapter {adapter!r} cannot be loaded: {error}") from error


def check_adapters_dir(settings: Settings) -> None:
    """Raise ModelError if the directory of adapters does not exist."""
    if settings.adapters_dir is not None and not os.path.isdir(settings.adapters_dir):
        raise ModelError(f"HEADRACE_ADAPTERS_DIR is {settings.adapters_dir!r}; there is no such directory")


def _trusted_folder(settings: Settings, source: str) -> Path:
    """The directory of a model, which not everybody can write. Raises ModelError, which names the setting."""
    try:
        folder = find_model(source)
        if not settings.allow_shared_model:
            check_not_shared(folder)
    except ModelError as error:
        if source == settings.draft_model:
            raise ModelError(f"HEADRACE_DRAFT_MODEL: {error}") from error
        raise
    return folder


def release_memory() -> None:
    """Free the memory of engines that nothing refers to any more."""
    gc.unfreeze()  # an engine that was built when the worker started is not garbage before
    gc.collect()
    gc.freeze()
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
