"""URLs of a Redis that Sentinel looks after: `sentinel://[user:password@]host:port,host:port/0?master=name`."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

DEFAULT_PORT = 26379


class SentinelUrl(NamedTuple):
    """Where the Sentinels are, which primary to ask them for, and how to log in there."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str | None
    password: str | None

    @property
    def login(self) -> dict[str, str]:
        """The user and the password, as far as there are any."""
        return {name: value for name in ("username", "password") if (value := getattr(self, name)) is not None}

    def for_celery(self) -> str:
        """The same as Celery and kombu write it; the primary's name goes into their transport options."""
        login = ":".join(quote(part or "", safe="") for part in (self.username, self.password))
        prefix = f"{login}@" if self.login else ""
        return ";".join(f"sentinel://{prefix}{host}:{port}/{self.database}" for host, port in self.hosts)


def is_sentinel(url: str) -> bool:
    """Whether the URL is of this form."""
    return url.startswith("sentinel://")


def parse_sentinel(url: str) -> SentinelUrl:
    """Read such a URL. Raises ValueError where it is none."""
    parts = urlsplit(url)
    login, _, addresses = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query, strict_parsing=True))
    if parts.scheme != "sentinel" or set(query) != {"master"}:
        raise ValueError("the primary's name is missing: ?master=name")
    return SentinelUrl(
        tuple(_address(address) for address in addresses.split(",")),
        query["master"],
        int(parts.path.strip("/") or 0),
        unquote(username) or None,
        unquote(password) or None,
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", str(DEFAULT_PORT))
    if not host or not 0 < int(port) < 65536 or set(host) & set("[]:/?#"):
        raise ValueError("a Sentinel's address is host or host:port; IPv6 goes by a name")
    return host, int(port)
