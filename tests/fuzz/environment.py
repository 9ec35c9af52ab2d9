"""Fuzz targets: settings from the environment, and the records that `headrace status` reads from Redis."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from headrace.client.jobs.status import WorkerStatus, _worker
from headrace.client.wire.queue_depth import _jobs_in, _scaled
from headrace.config.settings import PREFIX, Settings, SettingsError, load_settings
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, JSON, NUMBERS, objects

#: Values of environment variables: without NUL, and with invalid UTF-8 as lone surrogates from U+DC80 on.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
    NUMBERS.map(lambda value: str(value) if not isinstance(value, int) or abs(value) < 10**4000 else "9" * 4_500),
    st.builds(
        lambda unit, count: unit * count,
        st.sampled_from(["9", "a", "/", "../", "~", "é"]),
        st.sampled_from([300, 60_000]),
    ),
)
SECRET = "hunter2"
URLS = st.builds(
    lambda scheme, user, tail, host: f"{scheme}{user}:{SECRET}{tail}@{host}",
    st.sampled_from(["redis://", "rediss://", "unix://", "redis+socket://", "http://", "", "redis:", "//"]),
    st.sampled_from(["", "user", "us er"]),
    st.sampled_from(["", "\n", "/", "@", "#", "?", ":", "\r\n"]),
    st.sampled_from(["host", "host:6379/0", "host:x", "host:99999999", "[::1", "", "/path"]),
)
NAMES = st.sampled_from([PREFIX + name.upper() for name in Settings.model_fields])
ENVIRONMENTS = (
    st.dictionaries(
        NAMES
        | ANY_TEXT.filter(lambda t: "\0" not in t and "=" not in t).map(
            lambda t: PREFIX + os.fsdecode(t.encode(errors="ignore"))
        )
        | st.just(PREFIX + "X" * 60_000),
        TEXTS,
        max_size=2,
    )
    | URLS.map(lambda url: {PREFIX + "REDIS_URL": url})
    | st.sampled_from(["~nobody-at-all/x", "~", "..", "a" * 300, "/" + "a" * 5_000, "org/name"]).map(
        lambda model: {PREFIX + "MODEL": model}
    )
)


def check_environment(environment: dict[str, str]) -> None:
    """Settings are accepted, or refused with an error that names one. The password is never shown."""
    with mock.patch.dict(os.environ, environment):
        try:
            settings = load_settings()
        except SettingsError as error:
            check_message(str(error), *(name[:100] for name in environment), PREFIX)
            assert SECRET not in str(error)
            return
    assert SECRET not in repr(settings)
    assert 0 < len(settings.model_name) <= 128


ADAPTERS = st.lists(
    objects(
        {"name": st.sampled_from(["pirate", "a/b", ""]), "loaded": st.booleans(), "rank": NUMBERS, "digest": TEXTS}
    ),
    max_size=3,
)
WORKERS = objects(
    {
        **{name: st.integers(0, 9).map(str) | TEXTS for name in WorkerStatus.model_fields},
        "adapters": ADAPTERS.map(json.dumps) | TEXTS,
    },
    needed=("model",),
)
MESSAGES = st.one_of(
    objects({"headers": objects({"jobs": NUMBERS | JSON}), "body": JSON}),
    JSON,
    objects({"headers": objects({"jobs": NUMBERS | JSON})}).map(lambda message: [message, "", ""]),
).map(json.dumps) | st.sampled_from(["[" * 100_000, "{", ""])


def check_status(case: tuple[dict[str, Any], list[str]]) -> None:
    """A worker's record is shown or skipped, and the job count that a message claims is bounded by its length."""
    record, messages = case
    worker = _worker("a", record)
    assert worker is None or worker.name == "a"
    if worker is not None:  # `headrace status --json` and /status.json show it
        json.loads(worker.model_dump_json().encode(), parse_constant=int)
    assert 0 <= _scaled(10, [_jobs_in(message) for message in messages]) <= 10 * max([1, *map(len, messages)])


TARGETS = [
    Target("settings", ENVIRONMENTS, check_environment, full_cases=10_000),
    Target("status", st.tuples(WORKERS, st.lists(MESSAGES, max_size=3)), check_status, full_cases=6_000),
]
