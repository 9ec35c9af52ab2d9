"""What Celery publishes of a task, in events, remote control and logs, without prompts and texts."""

from __future__ import annotations

import re
from typing import Any

from celery.worker.request import Request

REDACTED = "<redacted>"

#: The fields of Celery's task events that can hold a prompt or a text.
_REDACTED_FIELDS = ("args", "kwargs", "result", "traceback")
#: The class and, for headrace's errors, the code in the text that Celery makes of an exception.
_EXCEPTION = re.compile(r"^(\w+)(?:\(('[a-z_]+'), )?")


class RedactedRequest(Request):
    """Celery's Request, which does not publish arguments, results and error messages.

    A producer may have put the arguments into the headers, from where Celery copies them into events, `inspect` and log
    records. The task itself reads its arguments from the body of the message. An error message may quote the request.
    """

    _args: Any
    _kwargs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._argsrepr, self._kwargsrepr = REDACTED, REDACTED if self._kwargs else "{}"
        self._args, self._kwargs = (REDACTED,), {}
        self.request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 (Celery's name)
        """Called by Celery for all events but `task-received`."""
        for name in _REDACTED_FIELDS:
            if name in fields:
                fields[name] = REDACTED
        if "exception" in fields:
            fields["exception"] = redact_exception(str(fields["exception"]))
        super().send_event(type, **fields)


def redact_exception(text: str) -> str:
    """Reduce the repr of an exception to its class and code, for example `JobFailed('invalid_request', ...)`."""
    found = _EXCEPTION.match(text)
    if found is None:
        return REDACTED
    name, code = found.groups()
    return f"{name}({code}, ...)" if code else f"{name}(...)"
