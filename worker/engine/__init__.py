"""Prompts to tokens. Usable without Celery and Redis."""
