"""A job's life inside the worker process, from delivery to stored result."""
