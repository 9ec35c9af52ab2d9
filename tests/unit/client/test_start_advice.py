"""Errors about a missing Redis or worker name the command for the situation at hand."""

from __future__ import annotations

import pickle

import pytest

from headrace.client import Client, NoWorker, RedisUnreachable
from headrace.client.http.errors import translate
from headrace.client.wire.start_advice import start_redis, start_worker, start_worker_here, use_worker
from headrace.config import load_settings

EMBEDDED = "embedded:///home/me/.local/share/headrace/redis"
SECRET = "rediss://me:secret@redis.internal:6390/2"


@pytest.mark.parametrize(
    ("url", "settings", "models", "command"),
    [
        (EMBEDDED, {}, ["demo"], "`headrace up`"),
        (EMBEDDED, {"model": "gpt2"}, [], "`headrace up --model gpt2`"),
        (EMBEDDED, {"model": "gpt2"}, ["demo"], "`headrace up --model demo`"),
        (EMBEDDED, {"model": "gpt2", "served_name": "prod"}, ["prod"], "`headrace up --model prod=gpt2`"),
        (EMBEDDED, {"model": "demo,chat=./my model"}, ["chat"], "`headrace up --model 'chat=./my model'`"),
        (EMBEDDED, {"model": "gpt2,chat=/m"}, ["gpt2", "chat"], "`headrace up --model gpt2,chat=/m`"),
        ("redis://host:6390/2", {}, ["demo"], "`HEADRACE_REDIS_URL=redis://host:6390/2 headrace up`"),
        (SECRET, {}, ["gpt2"], "`headrace up --model gpt2` with the same HEADRACE_REDIS_URL"),
    ],
)
def test_the_command_has_the_model_and_the_redis_that_are_meant(
    url: str, settings: dict[str, str], models: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "model" in settings:
        monkeypatch.setenv("HEADRACE_MODEL", settings["model"])
    assert start_worker(url, models, load_settings(**settings)) == command


def test_a_command_for_a_worker_that_runs_names_its_model_alone() -> None:
    assert use_worker('generate "Hello."', EMBEDDED, "demo") == '`headrace generate "Hello."`'
    assert use_worker("generate Hi", EMBEDDED, "chat") == "`headrace generate Hi --model chat`"


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("redis://localhost/0", "start it with `redis-server --port 6379`; without HEADRACE_REDIS_URL `headrace up` "),
        ("redis://127.0.0.1:6390/0", "start it with `redis-server --port 6390`; "),
        (SECRET, "start it, or correct HEADRACE_REDIS_URL; without HEADRACE_REDIS_URL `headrace up` "),
        ("unix:///run/redis.sock", "start it, or correct HEADRACE_REDIS_URL; "),
        (EMBEDDED, "start it and a worker with `headrace up`, or set HEADRACE_REDIS_URL"),
    ],
)
def test_a_redis_that_is_missing_is_started_where_it_is_looked_for(url: str, advice: str) -> None:
    assert start_redis(url).startswith(advice)
    assert "secret" not in start_redis(url)


def test_a_client_names_the_model_of_its_own_jobs() -> None:
    with Client(redis_url="redis://localhost:1/0", model="gpt2-medium") as client:
        with pytest.raises(RedisUnreachable, match=r"`redis-server --port 1`.*`headrace up --model gpt2-medium`") as it:
            client.submit("Hello.")
        assert str(pickle.loads(pickle.dumps(it.value))) == str(it.value)
        late = NoWorker("a", 1, "queued", "headrace.chat", start_worker(client.url, ["chat"]))
    assert "start a worker with `HEADRACE_REDIS_URL=redis://localhost:1/0 headrace up --model chat`" in str(late)
    assert str(pickle.loads(pickle.dumps(late))) == str(late)


def test_users_of_the_http_api_see_no_path_and_no_address() -> None:
    with Client(settings=load_settings(redis_url=SECRET, model="chat=/models/chat")) as client:
        here = start_worker_here(client.url, ["chat"])
    assert here == "`headrace up --model chat=DIRECTORY` with the same HEADRACE_REDIS_URL"
    shown = translate(NoWorker("a", 1, "queued", "headrace.chat", "`up`", here)).message
    assert shown == f"no worker serves the model; try again later, or on the server run {here}"
    down = translate(RedisUnreachable("redis://redis.internal:1/0", "refused", start_redis(SECRET))).message
    assert down == (
        "the queue cannot be reached; try again later, or on the server start the Redis that HEADRACE_REDIS_URL names"
    )
