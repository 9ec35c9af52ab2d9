"""Convert models of other formats to a directory with safetensors, which the loader reads."""

from headrace.model.convert.conversion import Converted, convert

__all__ = ["Converted", "convert"]
