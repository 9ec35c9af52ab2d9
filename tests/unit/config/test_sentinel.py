"""URLs of Sentinels: parsed, refused, passed to Celery as kombu parses them, and shown without their password."""

from __future__ import annotations

import pytest
from kombu import Connection
from kombu.utils.url import parse_url

from headrace.client.wire.celery import celery_url, sentinel_options
from headrace.config import SettingsError, load_settings
from headrace.config.sentinel import SentinelUrl, parse_sentinel
from headrace.config.settings import redact_url

FULL = "sentinel://us%40er:p%2Fw@one:26380,two:26379,three/4?master=jobs"


def test_all_parts_are_read() -> None:
    hosts = (("one", 26380), ("two", 26379), ("three", 26379))
    assert parse_sentinel(FULL) == SentinelUrl(hosts, "jobs", 4, "us@er", "p/w")
    assert parse_sentinel("sentinel://:secret@one?master=jobs") == SentinelUrl(
        (("one", 26379),), "jobs", 0, None, "secret"
    )
    assert load_settings(redis_url=FULL).redis_url == FULL


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://one:26379/0",
        "sentinel://one:26379/0?master=",
        "sentinel://one:26379/0?master=jobs&ssl=1",
        "sentinel://one:26379/x?master=jobs",
        "sentinel://one:0/0?master=jobs",
        "sentinel://one:70000/0?master=jobs",
        "sentinel://one,,two/0?master=jobs",
        "sentinel:///0?master=jobs",
        "sentinel://[::1]:26379/0?master=jobs",
    ],
)
def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"HEADRACE_REDIS_URL.*master=name"):
        load_settings(redis_url=url)


def test_kombu_finds_every_sentinel_and_the_login_in_what_it_is_given() -> None:
    connection = Connection(celery_url(FULL), transport_options=sentinel_options(FULL))
    found = [parse_url(url) for url in connection.alt]
    assert [(each["hostname"], each["port"]) for each in found] == [("one", 26380), ("two", 26379), ("three", 26379)]
    for each in found:
        assert (each["transport"], each["userid"], each["password"]) == ("sentinel", "us@er", "p/w")
        assert each["virtual_host"] == "4"
    assert connection.transport_options["master_name"] == "jobs"
    assert sentinel_options("redis://localhost") == {}


def test_no_password_is_shown() -> None:
    assert redact_url(FULL) == "sentinel://us%40er:***@one:26380,two:26379,three/4?master=jobs"
    assert "p%2Fw" not in repr(load_settings(redis_url=FULL))
