"""The worker: Celery on the outside, the engine on the inside."""
