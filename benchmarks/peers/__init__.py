"""The other ways to compute the same tokens on a CPU, each set up as its own documentation would have it run."""
