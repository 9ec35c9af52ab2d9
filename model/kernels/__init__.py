"""Compiled CPU kernels. Imports nothing else of `model`."""
