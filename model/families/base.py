"""What a family of models is: how its config.json and its files describe the one decoder that computes all of them.

The decoder's tensors have the names of GPT-2, and its linear weights are [in, out] (`decoder_shapes`). A family says
for each tensor of its files which tensor of the decoder it becomes.

The decoder computes: learned positions; layer norms with biases before attention and before the feed-forward layers;
two feed-forward matrices with one of `config.ACTIVATIONS` between them; the options of `ModelConfig`. Rotary positions,
RMS norms, gated feed-forward layers, or layers that are not named `h.{i}.`, need a change of the decoder or of
`Family.stored` first.

To add a family:

1. Copy gpt_neo.py, which shows everything: other names in config.json, matrices stored as [out, in], q, k and v apart,
   biases that are missing. `read_config` refuses each value that the decoder does not compute (`ConfigFields.refuse`).
2. List the family in `FAMILIES` (__init__.py). Loading, `headrace convert` and error messages then know it.
3. Add it to the references of `headrace validate`, which share no code with this folder:
   worker/fidelity/references/shape.py, decoder_weights.py and transformers.py.
4. Add tiny models of it to tests/zoo (weights.py, table_of_families.py), and run `make zoo ZOO=--write`.
5. Name it in the table of docs/your-own-model.md. GGUF files of it need an entry in model/gguf_file.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.model.families.fields import ConfigFields


def unchanged(tensor: Tensor) -> Tensor:
    """For tensors that the files store as the decoder reads them."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """For linear weights that the files store as [out, in]."""
    return tensor.t().contiguous()


class Stored(NamedTuple):
    """A tensor as the files of a family store it."""

    #: Its shape in the file.
    shape: tuple[int, ...]
    #: The tensor of the decoder that it becomes, or becomes a part of.
    target: str
    #: Makes the tensor of the file, of any type, the decoder's.
    convert: Callable[[Tensor], Tensor] = unchanged
    #: The first of the columns (the last dimension) of the target that it fills; None: it fills all of them.
    column: int | None = None


#: The token embedding, which all families name alike.
EMBEDDING_NAME = "wte.weight"
#: The head, which all families store alike, unless it is the token embedding.
HEAD_NAME = "lm_head.weight"
_LAYER = re.compile(r"h\.(0|[1-9]\d{0,6})\.([a-z_.0-9]+)")


def outer_tensors(config: ModelConfig) -> dict[str, Stored]:
    """The tensors outside the layers as files store them, without the head."""
    return {name: Stored(shape, name) for name, shape in outer_shapes(config).items()}


def head_tensor(config: ModelConfig) -> Stored:
    """The head as files store it."""
    return Stored((config.vocab_size, config.n_embd), HEAD_NAME)


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Names of tensors are given without prefixes (model/weight_names.py). In all families tensors of layer i are named
    `h.{i}.`, and those outside the layers as in GPT-2.
    """

    #: As in config.json.
    model_type: str
    #: For people: "GPT-2".
    title: str
    #: The names of fields of config.json that transformers accepts for another name: alias -> name.
    aliases: dict[str, str]
    #: The shape that config.json describes. Raises ModelError for what cannot be computed.
    read_config: Callable[[ConfigFields], ModelConfig]
    #: The tensors of one layer, without `h.{i}.`. A bias of the decoder that no tensor fills is zero.
    layer: Callable[[ModelConfig], dict[str, Stored]]
    #: Tensors of a layer that are not weights: masks in old files.
    buffers: frozenset[str] = frozenset()

    def stored(self, name: str, config: ModelConfig) -> Stored | None:
        """What the files store under a name; None if the model has no such tensor.

        The names of all tensors are never listed: config.json can declare more layers than memory could hold names for.
        """
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return head_tensor(config) if name == HEAD_NAME else outer_tensors(config).get(name)
        found = self.layer(config).get(layer[2]) if int(layer[1]) < config.n_layer else None
        return found and found._replace(target=f"h.{layer[1]}.{found.target}")

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is one of those that old files contain and that are not weights."""
        layer = _LAYER.fullmatch(name)
        return layer is not None and layer[2] in self.buffers

    def shapes(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that the files must have."""
        yield from outer_shapes(config).items()
        layer = self.layer(config)
        for i in range(config.n_layer):
            for name, stored in layer.items():
                yield f"h.{i}.{name}", stored.shape
        if not config.tied_head:
            yield HEAD_NAME, head_tensor(config).shape

    def count(self, config: ModelConfig) -> int:
        """The number of tensors that the files must have."""
        return len(outer_shapes(config)) + config.n_layer * len(self.layer(config)) + (not config.tied_head)

    def parameters(self, config: ModelConfig) -> int:
        """The number of weights; a tied head is counted once."""
        of_layer = sum(math.prod(stored.shape) for stored in self.layer(config).values())
        outer = sum(map(math.prod, outer_shapes(config).values()))
        head = 0 if config.tied_head else math.prod(head_tensor(config).shape)
        return outer + config.n_layer * of_layer + head

    def missing_layer_tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer of the decoder that no file of the family stores: biases, which are zero."""
        filled = {stored.target for stored in self.layer(config).values()}
        return {name: shape for name, shape in layer_shapes(config).items() if name not in filled}


def decoder_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the decoder; linear weights are [in, out]."""
    yield from outer_shapes(config).items()
    for i in range(config.n_layer):
        for name, shape in layer_shapes(config).items():
            yield f"h.{i}.{name}", shape
    if not config.tied_head:
        yield HEAD_NAME, head_tensor(config).shape


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors outside its layers, without the head."""
    e = config.n_embd
    return {
        "wte.weight": (config.vocab_size, e),
        "wpe.weight": (config.n_positions, e),
        "ln_f.weight": (e,),
        "ln_f.bias": (e,),
    }


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors of one layer. The columns of c_attn are those of q, then k, then v."""
    e, inner = config.n_embd, config.inner
    fused = e + 2 * config.kv_heads * config.head_dim
    return {
        "ln_1.weight": (e,),
        "ln_1.bias": (e,),
        "attn.c_attn.weight": (e, fused),
        "attn.c_attn.bias": (fused,),
        "attn.c_proj.weight": (e, e),
        "attn.c_proj.bias": (e,),
        "ln_2.weight": (e,),
        "ln_2.bias": (e,),
        "mlp.c_fc.weight": (e, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, e),
        "mlp.c_proj.bias": (e,),
    }
