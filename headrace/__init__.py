"""GPT-2 behind a Celery queue: a client, a worker, a model."""
