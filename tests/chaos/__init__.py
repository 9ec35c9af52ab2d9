"""Fault injection into real workers and a real Redis. See `python -m tests.chaos --help`."""
