"""`headrace serve`: the OpenAI HTTP API for completions, models, files and batches, in front of the queue.

The server is a client of the queue like any other: it loads no model, and several servers can share one Redis. It needs
the extra `http`. `serve.py` starts it, `app.py` assembles it, `routes/` has one module for each group of URLs.
"""
