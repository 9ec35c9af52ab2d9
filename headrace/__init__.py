"""GPT-2 behind a Celery queue: `headrace.client` submits prompts, `headrace.worker` computes them in batches.

The four packages are links to the folders at the top of the project: `headrace/client` is `client/`, and so on.
"""

__version__ = "0.1.0"
