"""What to do about connection errors of Redis that do not go away by themselves."""

from __future__ import annotations

#: Part of the reason if the process has no free descriptors.
NO_DESCRIPTORS = "Too many open files"

#: Reasons that `client.wire.redis.explain` finds when only one side uses TLS.
NO_TLS, TLS = "the server has no TLS", "the server speaks TLS"

#: Part of a connection error -> what to do, for errors that do not go away by themselves.
_ADVICE = {
    "certificate verify failed": "its certificate is not trusted for this host: give the authority's file in "
    "HEADRACE_REDIS_URL, rediss://...?ssl_ca_certs=/path/to/ca.pem, and the host as the certificate names it",
    "no such file": "correct the paths in HEADRACE_REDIS_URL; without ssl_ca_certs the system's authorities are used",
    "username-password": "correct user and password in HEADRACE_REDIS_URL, redis://user:password@host",
    "authentication required": "put user and password into HEADRACE_REDIS_URL, redis://user:password@host",
    "wrong version number": "it does not use TLS: for a connection without TLS write redis://",
    "record layer failure": "it does not use TLS: for a connection without TLS write redis://",
    NO_TLS.lower(): "enable TLS there, or write redis:// in HEADRACE_REDIS_URL for a connection without encryption",
    TLS.lower(): "write rediss:// in HEADRACE_REDIS_URL, with ?ssl_ca_certs=/path/to/ca.pem for your own authority",
}


def connection_advice(reason: str) -> str | None:
    """What to do about a connection error that does not go away by itself; None for any other error."""
    return next((advice for sign, advice in _ADVICE.items() if sign in reason.lower()), None)
