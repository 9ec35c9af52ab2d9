"""Programs that others wrote, which drive the server and the worker: `make clients`. Not part of `make test`."""
