"""URLs of a Redis managed by Sentinel: `sentinel://[user:password@]host:port,host:port/0?master=name`."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

DEFAULT_PORT = 26379


class SentinelUrl(NamedTuple):
    """A parsed URL: addresses of the Sentinels, name of the primary, database and login of the primary."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str | None
    password: str | None

    @property
    def login(self) -> dict[str, str]:
        """The user name and password that are set."""
        return {name: value for name in ("username", "password") if (value := getattr(self, name)) is not None}

    def for_celery(self) -> str:
        """The URL in the form of Celery and kombu, which take the primary's name from their transport options."""
        login = ":".join(quote(part or "", safe="") for part in (self.username, self.password))
        prefix = f"{login}@" if self.login else ""
        return ";".join(f"sentinel://{prefix}{host}:{port}/{self.database}" for host, port in self.hosts)


def is_sentinel(url: str) -> bool:
    """Whether the URL has the scheme `sentinel`."""
    return url.startswith("sentinel://")


def parse_sentinel(url: str) -> SentinelUrl:
    """Parse a Sentinel URL. Raises ValueError if it is malformed."""
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
        raise ValueError("the address of a Sentinel is host or host:port; an IPv6 address needs a host name")
    return host, int(port)
