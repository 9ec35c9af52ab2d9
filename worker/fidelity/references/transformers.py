"""The model of transformers for each family. Its activations are captured by hooks; this module computes no part of it.

q, k and v are split and reordered as each family has them, which is all that this module knows of their layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headrace.worker.fidelity.references.base import (
    Array,
    ReferenceUnavailable,
    check_tokens,
    import_library,
    library_name,
    with_outcome,
)
from headrace.worker.fidelity.references.files import StoredWeights, weight_files
from headrace.worker.fidelity.references.shape import Shape, read_shape


class TransformersReference:
    """The model of Hugging Face with eager attention, the only implementation that materializes its scores."""

    def __init__(self, model: Any, shape: Shape, *, adapted: bool = False) -> None:
        self.name = library_name("transformers") + (f" + {library_name('peft')}" if adapted else "")
        self.model, self.shape = model, shape

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """See `Reference.trace`."""
        captured = _Captured()
        body = self.model.transformer
        block = body.h[0]
        with ExitStack() as hooks:
            for name, module in {
                "ln_1": block.ln_1,
                "attn": block.attn,
                "mlp": block.mlp,
                **self._projections(block.attn),
            }.items():
                hooks.enter_context(captured.output(name, module))
            # The input of each block, and of the final norm, is the residual stream.
            for layer, module in enumerate([*body.h, body.ln_f]):
                hooks.enter_context(captured.input(f"hidden_{layer}", module))
            scores = hooks.enter_context(_reading_scores(block.attn, scaled=self.shape.family != "gpt_neo"))
            logits = self._logits(token_ids)
        tensors = {name: captured.tensors[name] for name in ("ln_1", "attn", "mlp")}
        tensors |= {"embeddings": captured.tensors["hidden_0"], "block_0": captured.tensors["hidden_1"]}
        tensors |= {"scores": scores.first, "logits": logits, **self._heads(captured.tensors)}
        tensors["hidden"] = torch.stack([captured.tensors[f"hidden_{layer}"] for layer in range(len(body.h) + 1)])
        return with_outcome({name: tensor.float().numpy() for name, tensor in tensors.items()})

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """See `Reference.generate`."""
        ids = list(token_ids)
        self._check(ids, count=count)
        for _ in range(count):
            ids.append(int(self._logits(ids, rows=1)[-1].argmax()))
        return ids[len(token_ids) :]

    @torch.inference_mode()
    def _logits(self, token_ids: Sequence[int], *, rows: int = 0) -> Tensor:
        """Return the last `rows` rows of the logits, or all if it is 0. -> [rows, V]."""
        ids = torch.tensor([self._check(token_ids)])
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits
        return logits[0]

    def _projections(self, attention: Any) -> dict[str, Any]:
        """The modules that compute q, k and v: one for each in GPT-Neo, one for all elsewhere."""
        if self.shape.family == "gpt_neo":
            inner = attention.attention
            return {"q": inner.q_proj, "k": inner.k_proj, "v": inner.v_proj}
        return {"qkv": attention.c_attn}

    def _heads(self, captured: dict[str, Tensor]) -> dict[str, Tensor]:
        """q [T, H, D]; k, v [T, KV, D]."""
        heads, kv_heads, size = self.shape.n_head, self.shape.kv_heads, self.shape.head_size
        if self.shape.family == "gpt_neo":
            return {name: captured[name].view(-1, heads, size) for name in "qkv"}
        qkv = captured["qkv"]  # [T, (H + 2 KV) D]
        if self.shape.family == "gpt_bigcode" and kv_heads == heads:  # q, k, v of the first head, then of the second
            parts = qkv.view(-1, heads, 3, size).unbind(-2)
        else:
            parts = torch.split(qkv.view(-1, heads + 2 * kv_heads, size), [heads, kv_heads, kv_heads], 1)
        return dict(zip("qkv", parts, strict=True))

    def _check(self, token_ids: Sequence[int], *, count: int = 0) -> list[int]:
        shape = self.shape
        return check_tokens(token_ids, count=count, n_positions=shape.n_positions, vocab_size=shape.vocab_size)


def load(folder: Path, dtype: str, adapter: Path | None = None) -> TransformersReference:
    """Load the reference with the weights of a directory. Raises the errors of `load_reference`."""
    model, shape = _load_model(folder, torch.bfloat16 if dtype == "int8" else getattr(torch, dtype))
    if adapter is not None:
        model = _with_adapter(model, adapter).get_base_model()
    if dtype == "int8":
        _round_operands(model, import_library("transformers", "transformers").pytorch_utils.Conv1D)
    return TransformersReference(model.eval(), shape, adapted=adapter is not None)


def fold(folder: Path, adapter: Path, target: Path) -> None:
    """Write a model into whose weights PEFT has folded an adapter, in float64.

    Raises the errors of `load_reference`.
    """
    model, _ = _load_model(folder, torch.float64)
    with _without_progress_bar(import_library("transformers", "transformers").logging):
        _with_adapter(model, adapter).merge_and_unload().save_pretrained(target)


def _with_adapter(model: Any, adapter: Path) -> Any:
    peft = import_library("peft", "peft")
    with warnings.catch_warnings(action="ignore"):
        return peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)


def _load_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Shape]:
    library = import_library("transformers", "transformers")
    shape = read_shape(folder)  # rejects the same directories as the other references
    weight_files(folder)
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    config.reorder_and_upcast_attn = False  # it changes the order of operations only, and hides the scores
    with _without_progress_bar(library.logging):
        model, report = library.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers initializes missing weights at random and only warns.
    if missing := sorted(report["missing_keys"]):
        if missing[0].removeprefix("transformer.") in StoredWeights(folder):
            raise ReferenceUnavailable(
                f"the reference 'transformers' finds no {missing[0]} in {folder}: the files have it with another prefix"
            )
        raise ValueError(f"{folder} has no weights named {', '.join(missing[:3])}")
    return model, shape


def _round_operands(model: Any, conv: type[torch.nn.Module]) -> None:
    """Round the operands of every matrix product to 8-bit integers, with a scale for each row and each column."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # the embedding itself is not rounded
    for module in model.modules():
        if isinstance(module, (conv, torch.nn.Linear)):
            summed = 0 if isinstance(module, conv) else 1  # Conv1D stores [in, out], Linear [out, in]
            weight: Any = module.weight
            weight.data = _rounded(weight.data, summed)
            module.register_forward_pre_hook(lambda _, args: (_rounded(args[0], -1),))


def _rounded(tensor: Tensor, dimension: int) -> Tensor:
    scale = tensor.float().abs().amax(dimension, keepdim=True).clamp_min(1e-30) / 127
    return ((tensor.float() / scale).round() * scale).to(tensor.dtype)


@contextmanager
def _without_progress_bar(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Captured:
    """Captures inputs and outputs of modules, without the batch dimension."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @contextmanager
    def output(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Capture the output of the module, or the first element of a tuple."""

        def keep(_module: object, _args: object, output: Any) -> None:
            self.tensors[name] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        handle = module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def input(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Capture the first argument of the module."""

        def keep(_module: object, args: tuple[Any, ...]) -> None:
            self.tensors[name] = args[0][0].clone()

        handle = module.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


class _ScoreListener(TorchFunctionMode):
    """Captures the scores, before the mask is added, while it listens.

    In eager attention they are `torch.matmul(query, key.transpose(-1, -2)) * scaling`, the first product of a
    four-dimensional tensor and a number; in GPT-Neo, whose scores are not scaled, the first four-dimensional result of
    `torch.matmul`. No module returns them, so hooks cannot capture them.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.listening = False
        self.kept: Tensor | None = None
        self._of: Any = Tensor.mul if scaled else torch.matmul

    @property
    def first(self) -> Tensor:
        """[H, T, T]."""
        if self.kept is None:
            raise RuntimeError("this version of transformers no longer computes its attention scores as expected")
        return self.kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.listening and self.kept is None and func is self._of and result.dim() == 4:
            self.kept = result[0].clone()
        return result


@contextmanager
def _reading_scores(attention: torch.nn.Module, *, scaled: bool) -> Iterator[_ScoreListener]:
    """Listen while the module runs."""
    products = _ScoreListener(scaled=scaled)

    def start(_module: object, _args: object) -> None:
        products.listening = True

    def stop(_module: object, _args: object, _output: object) -> None:
        products.listening = False

    handles = [attention.register_forward_pre_hook(start), attention.register_forward_hook(stop)]
    try:
        with products:
            yield products
    finally:
        for handle in handles:
            handle.remove()
