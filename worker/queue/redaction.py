"""What Celery publishes of a task, in events, remote control and logs, without prompts and texts."""

from __future__ import annotations

import logging
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


#: Celery's loggers that write errors of tasks.
_ERROR_LOGGERS = ("celery.app.trace", "celery.backends.base", "celery.backends.redis")


class _ErrorsWithoutMessages(logging.Filter):
    """Reduces the errors in a log record to their class and code, and tracebacks to the lines of the program."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        if isinstance(record.args, dict):
            record.args = {**record.args, **_redacted_context(record.args)}
            record.__dict__["data"] = record.args
        elif record.args:
            record.args = tuple(
                redact_exception(repr(arg)) if isinstance(arg, BaseException) else arg for arg in record.args
            )
        return True


_FILTER = _ErrorsWithoutMessages()


def redact_error_logs() -> None:
    """Keep the messages of errors, which may quote a request, out of Celery's log records in this process."""
    for name in _ERROR_LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)  # adding it again changes nothing


def _redacted_context(context: Any) -> dict[str, str]:
    """The redacted values among those that Celery logs about a task."""
    redacted = {name: REDACTED for name in ("args", "kwargs", "return_value") if name in context}
    if "exc" in context:
        redacted["exc"] = redact_exception(str(context["exc"]))
    if "traceback" in context:
        places = [line for line in str(context["traceback"]).splitlines() if line.startswith("  File ")]
        redacted["traceback"] = "\n".join(places)
    return redacted
