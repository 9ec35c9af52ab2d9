"""The fingerprint of an engine: what its results depend on besides prompt, parameters and seed.

Where the project's kernels compute everything in an order that is written down, the fingerprint names that order
(`numerics-1`) and no machine: workers on different CPUs have the same one. Otherwise it names what chose the order.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from headrace import __version__
from headrace.model.decoder import Decoder
from headrace.model.generation_config import Ends
from headrace.model.kernels import isa
from headrace.model.kernels.attention import decode_kernel
from headrace.model.kernels.packed_weight import PackedWeight
from headrace.model.kernels.sampling import sampling_works
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.request_defaults import NO_DEFAULTS, Defaults

#: The version of the arithmetic: of every sum's order, every polynomial and every rounding. It is raised when results
#: change in any bit, and then the digests in tests/numerics are made again.
NUMERICS = 1
#: Products whose bits are the same on every instruction set; those of the others depend on the kind of CPU.
PORTABLE_PRODUCTS = frozenset({"floats", "int8", "bf16-fma"})
#: Variables by which the libraries choose other machine code, and with it other last bits of the results.
MACHINE_CODE_VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
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
    parts = (
        f"headrace-{__version__}",
        *_arithmetic(model, prefill_chunk),
        f"weights-{model.digest[:12] or 'unknown'}",
        f"config-{hashlib.sha256(repr(model.config).encode()).hexdigest()[:8]}",
        f"vocabulary-{tokenizer.digest[:12] or 'unknown'}",
        f"ends-{ends.digest[:8]}",
        f"prompts-{_prompts_digest(tokenizer, parse_special_tokens)[:8]}",
        *([f"defaults-{hashlib.sha256(repr(sorted(defaults.items())).encode()).hexdigest()[:8]}"] if defaults else []),
        "batch-invariant" if invariant else "batch-dependent",
    )
    return "/".join(parts)


def _arithmetic(model: Decoder, prefill_chunk: int) -> list[str]:
    """How this process computes: the version of the arithmetic, or everything that the libraries' choice depends on."""
    precision = "int8" if model.gemm_backend == "int8" else str(model.dtype).removeprefix("torch.")
    if _kernels_compute_all(model):
        numerics = [f"numerics-{NUMERICS}", precision]
        if model.gemm_backend in PORTABLE_PRODUCTS and isa.architecture() == "x86_64":  # never compared on others
            return numerics
        return [*numerics, f"kernels-{isa.chosen().name}", f"products-{model.gemm_backend}", f"cpu-{_cpu_vendor()}"]
    device = model.device.type
    processor = (
        torch.cuda.get_device_name(model.device) if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    return [
        f"torch-{torch.__version__}",
        processor.replace(" ", "-"),
        precision,
        f"threads-{torch.get_num_threads()}",
        f"kernels-{isa.chosen().name}",
        f"products-{model.gemm_backend}",
        f"attention-{'compiled' if decode_kernel(model.config.head_dim, model.dtype, device) else 'torch'}",
        f"sampling-{'compiled' if sampling_works(device, model.dtype) else 'torch'}",
        f"chunk-{prefill_chunk}",
        *([f"environment-{variables}"] if (variables := _variables_digest()) else []),
    ]


def _kernels_compute_all(model: Decoder) -> bool:
    """Whether no operator of torch that sums, or computes a function, is on the way from a prompt to a token."""
    device, dtype = model.device.type, model.dtype
    return (
        model.fused_decoder is not None
        and isinstance(model.lm_head.gemm, PackedWeight)
        and decode_kernel(model.config.head_dim, dtype, device) is not None
        and sampling_works(device, dtype)
    )


def _cpu_vendor() -> str:
    """The maker of this CPU, as Linux names it; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), isa.architecture())


def _variables_digest() -> str:
    """A short hash of the variables in MACHINE_CODE_VARIABLES; empty if none is set, as usual."""
    found = [(name, value) for name in MACHINE_CODE_VARIABLES if (value := os.environ.get(name))]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:8] if found else ""


def _prompts_digest(tokenizer: Tokenizer, parse: bool | None) -> str:
    """A hash of what becomes of messages, and of special tokens in the text of a prompt."""
    template, parse = tokenizer.chat_template, tokenizer.parses_special_tokens if parse is None else parse
    named = [] if template is None else sorted(tokenizer.special_tokens.items())  # which only templates read
    return hashlib.sha256(repr((template, named, parse)).encode()).hexdigest()
