"""Many jobs: read requests from a file or an iterable, compute them through a bounded window, write the results."""
