"""Real workers and a real Redis that are killed, stopped, cut off and filled up. `python -m tests.chaos --help`."""
