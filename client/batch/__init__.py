"""Many jobs: read rows, check them, run them through a bounded window, write their results."""
