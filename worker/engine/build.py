"""Settings -> engine: loads the model, sizes the cache, measures whether batches change bits on this machine."""

from __future__ import annotations

import gc

import structlog
import torch

from headrace import __version__
from headrace.client.wire.requests import GenerateRequest
from headrace.config import Settings
from headrace.model.attention import SHORT
from headrace.model.config import GPT2Config
from headrace.model.gpt2 import GPT2
from headrace.model.hub import ModelError
from headrace.model.kernels.attention import decode_kernel
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.model.weights import load_model
from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.cgroups import free_memory
from headrace.worker.engine.engine import LENGTH_CLASSES, Engine
from headrace.worker.engine.model_runner import Runner
from headrace.worker.engine.scheduler import PromptChunk, Scheduler, Step
from headrace.worker.engine.sequence import Sequence, TokenScore

log = structlog.get_logger("headrace.engine")

#: Share of the free memory that the cache may take if HEADRACE_KV_CACHE_BYTES does not say.
CACHE_SHARE = 0.25


def build_engine(settings: Settings, name: str | None = None) -> Engine:
    """The engine that `Engine.from_settings` promises, not started yet."""
    name = name or settings.model_name
    source, parts = settings.models[name], len(settings.models)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = load_model(source, device=settings.device, dtype=settings.dtype)
    tokenizer = load_tokenizer(source)
    check_vocabulary(source, model.config, tokenizer)
    max_context = min(settings.max_context or model.config.n_positions, model.config.n_positions)
    lengths = length_classes(max_context)
    runner = Runner(model, lengths)
    if settings.kv_cache_bytes:
        budget = settings.kv_cache_bytes // parts
    else:
        budget = default_budget(settings.slots * lengths[-1] * runner.position_bytes, model.device, parts)
    slots = SlotTable(lengths, position_bytes=runner.position_bytes, budget_bytes=budget)
    invariant = batch_invariant(model, tokenizer)
    engine = Engine(
        runner,
        tokenizer,
        Scheduler(
            slots,
            max_rows=settings.slots,
            step_tokens=settings.step_tokens,
            prefill_chunk=settings.prefill_chunk,
            # Elsewhere a draft may change the last bits of a row, or cost as much as a row of its own.
            draft_tokens=settings.draft_tokens if invariant and runner.takes_drafts else 0,
        ),
        model_name=name,
        vocab_size=model.config.vocab_size,
        max_context=max_context,
        fingerprint=fingerprint(model, settings.prefill_chunk, invariant),
    )
    log.info("model.loaded", model=name, fingerprint=engine.fingerprint, cache_bytes=budget)
    return engine


def length_classes(max_context: int) -> list[int]:
    """The classes of the cache for sequences of up to `max_context` tokens; the last one is that, in steps of 16."""
    last = -(-max_context // 16) * 16
    return [length for length in LENGTH_CLASSES if length < last] + [last]


def release_memory() -> None:
    """Give back what an engine held that nobody has a reference to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_budget(wanted: int, device: torch.device, parts: int = 1) -> int:
    """Room for every slot at full length, in bytes; of a quarter of the memory that is free now no more than one of so
    many equal parts.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return min(wanted, int(free * CACHE_SHARE / parts))


def check_vocabulary(name: str, config: GPT2Config, tokenizer: Tokenizer) -> None:
    """A tokenizer may know fewer tokens than the embedding has rows (padding), never more."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"model {name!r}: its tokenizer has {tokenizer.vocab_size} tokens and its embedding {config.vocab_size}; "
            "put the vocabulary it was trained with (vocab.json and merges.txt) into its directory"
        )


def fingerprint(model: GPT2, prefill_chunk: int, invariant: bool) -> str:
    """What a result depends on beside prompt, parameters and seed; equal strings mean equal results."""
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
        f"products-{model.products}",
        f"attention-{'compiled' if decode_kernel(model.config.head_dim, model.dtype, model.device.type) else 'torch'}",
        f"chunk-{prefill_chunk}",
        f"weights-{model.digest[:12] or 'unknown'}",
        "batch-invariant" if invariant else "batch-dependent",
    )
    return "/".join(parts)


def batch_invariant(model: GPT2, tokenizer: Tokenizer) -> bool:
    """Measure whether a row's logits are the same bits alone and among 3, 20 and 21 others; takes a few steps.

    The promise of equal answers alone and in a crowd rests on kernels that nobody guarantees, so it is looked at here,
    on this machine with this model, and results say what was found. One of the others has a prompt so long that the
    step is computed in pieces.
    """
    most = model.config.n_positions - 4
    probe = [(7919 * i) % model.config.vocab_size for i in range(min(20, most))]
    alone = _probe_logprobs(model, tokenizer, probe, [])
    crowds = (
        [[t] for t in (1, 2, 3)],
        [[t, t + 1] for t in range(20)],
        [*(list(range(t, t + 7)) for t in range(20)), list(range(min(SHORT + 1, most)))],
    )
    return all(_probe_logprobs(model, tokenizer, probe, crowd) == alone for crowd in crowds)


def _probe_logprobs(
    model: GPT2, tokenizer: Tokenizer, probe: list[int], crowd: list[list[int]]
) -> list[TokenScore | None]:
    """Scores of three tokens after the probe, computed beside a crowd of other prompts, through a cache of its own."""
    request = GenerateRequest(prompt=[0], max_tokens=4, temperature=0, logprobs=1, ignore_eos=True)
    prompts = [*crowd, probe]
    longest = -(-(max(map(len, prompts)) + 4) // 16) * 16
    runner = Runner(model, [longest])
    slots = SlotTable([longest], position_bytes=1, budget_bytes=longest * (len(prompts) + 8))
    sequences = [
        Sequence(request, [t % model.config.vocab_size for t in prompt], 0, 0, tokenizer) for prompt in prompts
    ]
    for sequence in sequences:
        slots.place(sequence)
    runner.fit(slots.capacity)
    step = Step(chunks=[PromptChunk(s, 0, len(s.prompt)) for s in sequences])
    scores: list[TokenScore | None] = []
    for _ in range(3):
        for sequence, score in runner.run(step).tokens:
            sequence.prefilled = len(sequence.prompt)
            if score is not None:
                sequence.append(score)
            if sequence is sequences[-1]:
                scores.append(score)
        step = Step(decodes=sequences)
    return scores
