"""Nothing that Celery publishes of a task shows a prompt or a text."""

from __future__ import annotations

import json
import logging
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.message import Message

from headrace.client.wire.celery import TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.queue.redaction import RedactedRequest, redact_error_logs, redact_exception

SECRET = "the secret prompt"


@pytest.mark.parametrize("named", [False, True])
def test_a_request_shows_no_argument_whatever_its_producer_wrote(named: bool) -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    args, kwargs = ([], {"request": {"prompt": SECRET}}) if named else ([{"prompt": SECRET}], {})
    sent: list[dict[str, Any]] = []
    message = Message(
        body=json.dumps([args, kwargs, {}]).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"id": "x", "task": TASK_NAME, "argsrepr": repr(args), "kwargsrepr": repr(kwargs)},
        accept={"application/json"},
    )
    eventer = SimpleNamespace(enabled=True, send=lambda kind, **fields: sent.append({"type": kind, **fields}))
    request = RedactedRequest(message, app=app, task=app.tasks[TASK_NAME], eventer=eventer)
    error = JobFailed("invalid_request", f"stop: got {SECRET!r}")
    request.send_event("task-failed", exception=repr(error), traceback=f"Traceback: {error!r}")
    request.send_event("task-succeeded", result=repr({"text": SECRET}), runtime=1.0)
    shown = [*sent, request.info(), request.info(safe=True), request.argsrepr, request.kwargsrepr, repr(request)]
    shown.append({name: request.request_dict[name] for name in ("argsrepr", "kwargsrepr")})
    assert SECRET not in repr(shown)
    assert [event.get("exception") for event in sent] == ["JobFailed('invalid_request', ...)", None]
    assert request.request_dict["args"] == args, "the task reads its arguments there"
    app.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (repr(JobFailed("nan_logits", "some logits are NaN")), "JobFailed('nan_logits', ...)"),
        ("TimeLimitExceeded(3.0)", "TimeLimitExceeded(...)"),
        ("KeyError('the secret prompt')", "KeyError(...)"),
        ("ValueError('secret', 'prompt')", "ValueError('secret', ...)"),
        ("<the secret>", "<redacted>"),
        ("", "<redacted>"),
    ],
)
def test_an_exception_is_reduced_to_its_class_and_code(text: str, shown: str) -> None:
    assert redact_exception(text) == shown


@pytest.mark.parametrize("name", ["celery.app.trace", "celery.backends.redis"])
def test_error_lines_of_celery_show_the_class_and_the_place_of_an_error(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    redact_error_logs()
    logger = logging.getLogger(name)
    try:
        raise JobFailed("invalid_request", f"stop: got {SECRET!r}")
    except JobFailed as error:
        text = traceback.format_exc()
        logger.exception("Chord %r raised: %r", "c", error)
        logger.error("raised: %(exc)s %(traceback)s", {"exc": repr(error), "traceback": text, "args": SECRET})
    assert SECRET not in caplog.text
    assert "Chord 'c' raised: \"JobFailed('invalid_request', ...)\"" in caplog.text.replace("\\", "")
    assert f'File "{__file__}", line' in caplog.text


def test_what_the_workers_app_sends_for_a_canvas_shows_no_argument() -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    made = app.amqp.create_task_message("x", "mine.join", [[SECRET]], {"last": SECRET}, create_sent_event=True)
    assert SECRET not in repr((made.headers, made.properties, made.sent_event))
    assert SECRET in repr(made.body)
    app.close()
