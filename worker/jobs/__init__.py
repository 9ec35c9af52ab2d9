"""The life of a job inside the worker process, from the delivery of its message to its stored result."""
