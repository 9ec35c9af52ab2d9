"""Compiled CPU kernels; imports nothing else of `model`. See README.md in this folder."""
