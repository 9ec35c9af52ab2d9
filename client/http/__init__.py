"""`headrace serve`: the HTTP API of OpenAI for completions, models, files and batches, in front of the queue.

A client like any other: it loads no model, and any number of servers may stand before one Redis. Needs the extra
`http`. Reading order: `app.py` (routes), `completions.py` (what is asked and answered), `gateway.py` (jobs),
`connections.py`, `guard.py` (who may ask how much), `storage.py`, `files.py`, `batches.py`.
"""
