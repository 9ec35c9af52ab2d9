"""Prompts to tokens: scheduling, the key-value cache, and the steps of the model. Needs neither Celery nor Redis."""
