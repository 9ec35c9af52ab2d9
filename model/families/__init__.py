"""The families of models, each of which describes itself to the one decoder in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.model.config import ModelConfig
from headrace.model.families.base import Family
from headrace.model.families.fields import ConfigFields
from headrace.model.families.gpt2 import GPT2
from headrace.model.families.gpt_bigcode import GPT_BIGCODE
from headrace.model.families.gpt_neo import GPT_NEO

__all__ = ["FAMILIES", "ConfigFields", "Family", "config_of", "family_of"]

#: `model_type` in config.json -> the family.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, GPT_BIGCODE, GPT_NEO)}


def family_of(path: Path, raw: Mapping[str, Any]) -> Family:
    """The family that a config.json names; GPT-2 where it names none.

    Raises:
        ModelError: there is no such family.
    """
    fields = ConfigFields(path, raw, {})
    name = fields.get("model_type", GPT2.model_type)
    if not isinstance(name, str) or name not in FAMILIES:
        fields.refuse("model_type", f"the supported families are {', '.join(FAMILIES)}; use a model of one of them")
    return FAMILIES[name]


def config_of(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of the model that the fields of a config.json describe; `path` is named in errors.

    Raises:
        ModelError: a field has a value that is not supported.
    """
    family = family_of(path, raw)
    fields = ConfigFields(path, raw, family.aliases)
    _refuse_what_no_family_computes(fields)
    return family.read_config(fields)


def _refuse_what_no_family_computes(fields: ConfigFields) -> None:
    for name in ("quantization_config", "compression_config"):
        if fields.get(name, None):
            fields.refuse(
                name,
                "quantized weights cannot be read; save the model with its weights in float32, float16 or bfloat16 "
                "(transformers: model.dequantize().save_pretrained(...)), or use the model it was made from",
            )
    if fields.get("add_cross_attention", False):
        fields.refuse("add_cross_attention", "only decoders without an encoder are computed; use a model without it")
    if fields.get("is_encoder_decoder", False):
        fields.refuse("is_encoder_decoder", "only decoders without an encoder are computed; use a model without it")
    if fields.get("pruned_heads", None):
        fields.refuse("pruned_heads", "only layers with all of their heads are computed; use the model before pruning")
    code = fields.get("auto_map", None)
    if isinstance(code, dict) and any(str(name).startswith("AutoModel") for name in code):
        fields.refuse(
            "auto_map",
            "the model is computed by Python code of its own, which is never run; convert it to one of the supported "
            f"families ({', '.join(FAMILIES)}), or remove auto_map if the code computes what its family does",
        )
