"""Read adapter_config.json: which modules a LoRA adapter changes, with which rank and scale.

What PEFT would compute and this project does not is refused by name, never ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import regex

from headrace.model.hub import MAX_CONFIG_BYTES, parse_json, short_repr
from headrace.model.trusted_files import ModelError, read_bytes

CONFIG_NAME = "adapter_config.json"
#: The largest rank. Larger ones would be slower than a model of its own.
MAX_RANK = 1024
#: Seconds that all regular expressions of an adapter may take for one module: some never end.
PATTERN_S = 0.1

T = TypeVar("T")

_MERGE = "merge the adapter into a model of its own with peft's merge_and_unload(), and serve that"
#: Fields that say how the adapter was trained or loaded, and nothing about what it computes.
_OF_TRAINING = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "megatron_core", "runtime_config", "eva_config", "corda_config", "lora_ga_config"),
        *(
            "fan_in_fan_out",
            "ensure_weight_tying",
        ),  # the first follows from the base; the second concerns saved modules
    }
)
_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "bias", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    }
)
#: Further fields with the value that asks for nothing, if None, False and an empty value are not the only ones.
_NEUTRAL: dict[str, Any] = {"qalora_group_size": 16}
#: Initialisations that leave the base as it is. Others change it, and the adapter fits only the changed base.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Modules are named as in the base model: `transformer.h.0.attn.c_attn`.

    Attributes:
        path: the file.
        rank, alpha: of modules that no pattern names.
        root_scale: divide by the square root of the rank (rank-stabilised LoRA), not by the rank.
        bias: whose biases the adapter has: none, all, or lora_only.
        targets, excluded: names or ends of names of modules, or one regular expression for whole names.
        layers: the layers that are changed; None: all of them.
        layer_lists: patterns of the names before the number of a layer; empty: any name.
        ranks, alphas: pattern of a module's name -> its own rank and alpha; the first that matches counts.
    """

    path: Path
    rank: int
    alpha: float
    root_scale: bool
    bias: str
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    layer_lists: tuple[str, ...]
    ranks: dict[str, int]
    alphas: dict[str, float]

    def changes(self, module: str) -> bool:
        """Whether the adapter changes a module. Raises ModelError if a regular expression takes too long."""
        if self._names(self.excluded, module, "exclude_modules") or not self._names(
            self.targets, module, "target_modules"
        ):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in self.layer_lists] or [r".*?\.[^.]*\.(\d+)\."]
        found = (self._match(pattern, module, "layers_pattern", whole=False) for pattern in patterns)
        number = next((match[1] for match in found if match is not None), None)
        return number is not None and int(number) in self.layers

    def rank_of(self, module: str) -> int:
        """The rank of a module that the adapter changes."""
        return self._of_pattern(self.ranks, module, "rank_pattern") or self.rank

    def scale_of(self, module: str) -> float:
        """What the product of the two matrices of a module is multiplied by."""
        own, rank = self._of_pattern(self.alphas, module, "alpha_pattern"), self.rank_of(module)
        return (self.alpha if own is None else own) / (math.sqrt(rank) if self.root_scale else rank)

    def _names(self, names: tuple[str, ...] | str, module: str, field: str) -> bool:
        if isinstance(names, str):
            return self._match(names, module, field) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _of_pattern(self, values: dict[str, T], module: str, field: str) -> T | None:
        of = (values[each] for each in values if self._match(rf"(?:.*\.)?(?:{each})", module, field) is not None)
        return next(of, None)

    def _match(self, pattern: str, module: str, field: str, *, whole: bool = True) -> regex.Match[str] | None:
        try:
            match = regex.fullmatch if whole else regex.match
            return match(pattern, module, timeout=PATTERN_S)
        except TimeoutError:
            raise ModelError(
                f"{self.path}: {field} has a regular expression that takes more than {PATTERN_S} s for "
                f"{module}; list the names of the modules instead"
            ) from None


def read_adapter_config(folder: Path) -> tuple[AdapterConfig, bytes]:
    """What the adapter_config.json in a directory says, and its bytes.

    Raises:
        ModelError: the file is missing, not JSON, not of a LoRA adapter, or asks for what is not computed.
    """
    path = folder / CONFIG_NAME
    data = read_bytes(path, MAX_CONFIG_BYTES)
    return _Fields(path, parse_json(path, data)).config(), data


class _Fields:
    """The fields of one adapter_config.json, with errors that name the field, its value and what would be right."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def config(self) -> AdapterConfig:
        self._refuse_others()
        targets = self._modules("target_modules")
        if not targets:
            self._refuse("target_modules", "it must name the modules that the adapter changes")
        layers = self.raw.get("layers_to_transform")
        lists = self.raw.get("layers_pattern") or []
        config = AdapterConfig(
            path=self.path,
            rank=self._rank("r", self.raw.get("r", 8)),
            alpha=self._alpha("lora_alpha", self.raw.get("lora_alpha", 8)),
            root_scale=self._flag("use_rslora"),
            bias=self._bias(),
            targets=targets,
            excluded=self._modules("exclude_modules"),
            layers=None if layers in (None, []) else frozenset(self._layers(layers)),
            layer_lists=tuple(self._texts("layers_pattern", [lists] if isinstance(lists, str) else lists)),
            ranks={key: self._rank("rank_pattern", value) for key, value in self._table("rank_pattern")},
            alphas={key: self._alpha("alpha_pattern", value) for key, value in self._table("alpha_pattern")},
        )
        self._check_patterns(config)
        return config

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise ModelError(f"{self.path}: {name} is {short_repr(self.raw.get(name))}; {reason}")

    def _refuse_others(self) -> None:
        """Refuse whatever changes results and is not read."""
        if self.raw.get("peft_type") != "LORA":
            self._refuse("peft_type", f"only 'LORA' is computed; {_MERGE}")
        task = self.raw.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            self._refuse("task_type", "it must be 'CAUSAL_LM': the adapter is of another kind of model")
        start = self.raw.get("init_lora_weights", True)
        if not isinstance(start, bool) and start not in _PLAIN_STARTS:
            self._refuse(
                "init_lora_weights",
                "it changed the base model before training, so the adapter is wrong on the plain base; save it with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        for name, value in self.raw.items():
            empty = value is None or value is False or value in ({}, [], "")
            if name not in _READ | _OF_TRAINING and not empty and value != _NEUTRAL.get(name, object()):
                self._refuse(name, f"it is not computed; {_MERGE}")

    def _flag(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            self._refuse(name, "it must be true or false")
        return value

    def _bias(self) -> str:
        value = self.raw.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            self._refuse("bias", "it must be 'none', 'all' or 'lora_only'")
        return str(value)

    def _rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            self._refuse(name, f"a rank must be a whole number from 1 to {MAX_RANK}; {_MERGE}")
        return value

    def _alpha(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            self._refuse(name, "it must be a number between -1e9 and 1e9")
        return float(value)

    def _modules(self, name: str) -> tuple[str, ...] | str:
        value = self.raw.get(name)
        if value == "all-linear":
            return r".*\.h\.\d+\..*"
        return value if isinstance(value, str) else tuple(self._texts(name, value or []))

    def _texts(self, name: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
            self._refuse(name, "it must be a list of names, or one regular expression")
        return value

    def _layers(self, value: Any) -> list[int]:
        numbers = value if isinstance(value, list) else [value]
        if not all(type(each) is int and 0 <= each < 2**31 for each in numbers):
            self._refuse("layers_to_transform", "it must be the number of a layer, or a list of such numbers")
        return numbers

    def _table(self, name: str) -> list[tuple[str, Any]]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            self._refuse(name, "it must be an object: the name of a module, or a regular expression, and its value")
        return list(value.items())

    def _check_patterns(self, config: AdapterConfig) -> None:
        patterns = {
            "target_modules": [config.targets] if isinstance(config.targets, str) else [],
            "exclude_modules": [config.excluded] if isinstance(config.excluded, str) else [],
            "layers_pattern": list(config.layer_lists),
            "rank_pattern": list(config.ranks),
            "alpha_pattern": list(config.alphas),
        }
        for name, each in ((name, each) for name, found in patterns.items() for each in found):
            try:
                regex.compile(each)
            except regex.error as error:
                self._refuse(name, f"{short_repr(each)} is not a regular expression ({error})")
