"""Tiny models of other people's making: each equals transformers, or is refused with a sentence (table.py)."""
