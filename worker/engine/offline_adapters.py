"""LoRA adapters of the offline engine, with vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import ADAPTER_FORM
from headrace.client.wire.values import show
from headrace.config.adapter_names import is_adapter_name
from headrace.worker.engine.adapters import Adapters

_FORM = "a LoRARequest, or a list with one or None for each prompt"


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for the prompts of a call.

    Attributes:
        lora_name: its name.
        lora_int_id: a number above zero, which vLLM needs; here the name and the files say which adapter it is.
        lora_path: its directory; empty for the adapter of this name in HEADRACE_ADAPTERS or HEADRACE_ADAPTERS_DIR.
        base_model_name: not read.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise InvalidRequest("lora_int_id", show(self.lora_int_id), "a whole number from 1 on")

    @property
    def name(self) -> str:
        """As `lora_name`."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """As `lora_int_id`."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """As `lora_path`."""
        return self.lora_path


def lora_requests(given: Any, count: int, adapters: Adapters) -> list[LoRARequest | None]:
    """The adapter of each of `count` prompts. Those with a directory become known to the engine by their names.

    Raises:
        InvalidRequest: it is no LoRARequest and no list of them, or a name is wrong or given to two directories.
    """
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if not listed:
        listed = [None] * count
    for each in listed:
        if each is not None and not isinstance(each, LoRARequest):
            raise InvalidRequest("lora_request", show(each), _FORM)
    if len(listed) != count:
        raise InvalidRequest("lora_request", f"{len(listed)} for {count} prompts", "one, or one for each")
    places: dict[str, str] = {}
    for each in filter(None, listed):
        if not is_adapter_name(each.lora_name):
            raise InvalidRequest("lora_name", show(each.lora_name), ADAPTER_FORM)
        if places.setdefault(each.lora_name, each.lora_path) != each.lora_path:
            raise InvalidRequest("lora_name", f"{show(each.lora_name)} for two directories", "a name for each adapter")
    for name, place in places.items():
        if not place:
            continue
        if not Path(place).is_dir():
            raise InvalidRequest(
                "lora_path", show(place), "the directory of an adapter, as PEFT's save_pretrained writes"
            )
        adapters.add(name, Path(place))
    return listed
