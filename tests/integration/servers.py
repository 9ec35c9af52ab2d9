"""Redis servers as operators run them: on a port, with users, behind TLS."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from headrace.worker.redis_binary import find_server
from tests.patience import PATIENCE_S

#: A Redis in cluster mode takes the port that is 10,000 higher too.
HIGHEST_PORT = 55_535


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) <= HIGHEST_PORT:
                return port


@contextlib.contextmanager
def redis_on_a_port(directory: Path, *options: str) -> Iterator[int]:
    """A server on a port of this machine. Fails with the last lines of its log if it refuses the options."""
    port, log = free_port(), directory / "redis.log"
    command = [str(find_server()[0]), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE_S
        # Connecting to the port would not prove it: another process may have taken the port just before.
        while "Ready to accept connections" not in log.read_text():
            assert process.poll() is None, f"the server ended: {log.read_text()[-1500:]}"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


class Authority:
    """A certificate authority for one test, and its certificate for localhost, created by the openssl program."""

    def __init__(self, directory: Path) -> None:
        assert shutil.which("openssl"), "the tests of TLS need the openssl program"
        directory.mkdir()
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        ca_key, request, extension = (directory / name for name in ("ca.key", "cert.csr", "extension"))
        extension.write_text("subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
        new = ["req", "-newkey", "rsa:2048", "-nodes", "-subj"]
        usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        _openssl(*new, f"/CN={directory.name}", "-x509", "-days", "2", *usage, "-keyout", ca_key, "-out", self.ca)
        _openssl(*new, "/CN=localhost", "-keyout", self.key, "-out", request)
        signed_by = ["-CA", self.ca, "-CAkey", ca_key, "-CAcreateserial"]
        _openssl("x509", "-req", "-in", request, *signed_by, "-days", "2", "-extfile", extension, "-out", self.cert)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Link:
    """A proxy to a server on a port of this machine. It can be cut like a network: no packet and no error arrives.

    Data that is sent during the cut is not lost, because TCP repeats it: when the link heals, it arrives, even from
    connections that have been closed in the meantime. New connections are not accepted (Linux), or accepted without
    any data.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._listener, selectors.EVENT_READ)
        self._whole, self._silent, self._closing = threading.Event(), threading.Event(), False
        self._whole.set()
        self._fillers: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.heal()
        self._thread.join()
        for key in list(self._ready.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._ready.close()

    def cut(self) -> None:
        """Stop all traffic in both directions."""
        self._silent.clear()
        self._whole.clear()
        assert self._silent.wait(PATIENCE_S)
        self._listener.listen(0)  # while one connection is not accepted, Linux drops the packets of others
        self._fillers = [socket.create_connection(("127.0.0.1", self.port))]

    def heal(self) -> None:
        """Resume the traffic, beginning with what was sent during the cut."""
        for filler in self._fillers:
            filler.close()
        self._fillers = []
        self._listener.listen()
        self._whole.set()

    def _run(self) -> None:
        while not self._closing:
            if not self._whole.is_set():
                self._silent.set()
                self._whole.wait()
            for key, _ in self._ready.select(0.02):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed by its other end just now
                    self._forward(key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept(self) -> None:
        outer, _ = self._listener.accept()
        inner = socket.create_connection(("127.0.0.1", self._target))
        self._ready.register(outer, selectors.EVENT_READ, inner)
        self._ready.register(inner, selectors.EVENT_READ, outer)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            data = source.recv(65_536)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (source, target):
                self._ready.unregister(end)
                end.close()


class TlsProxy:
    """Terminates TLS in front of a Redis without TLS support, as stunnel or a cloud's load balancer does."""

    def __init__(self, target: int, authority: Authority, *, client_ca: Path | None = None) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority.cert, authority.key)
        if client_ca is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(client_ca)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        #: Connections over which the handshake succeeded.
        self.connections = 0
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TlsProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.settimeout(10)
            outer = stack.enter_context(self._context.wrap_socket(connection, server_side=True))
            self.connections += 1
            outer.settimeout(None)
            _pump(outer, stack.enter_context(socket.create_connection(("127.0.0.1", self._target))))


def _pump(outer: ssl.SSLSocket, inner: socket.socket) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(outer, selectors.EVENT_READ, inner)
        ready.register(inner, selectors.EVENT_READ, outer)
        while True:
            for key, _ in ready.select():
                source: socket.socket = key.fileobj  # type: ignore[assignment]
                data = source.recv(65_536)
                while source is outer and outer.pending():  # decrypted already: no selector sees it
                    data += outer.recv(65_536)
                if not data:
                    return
                key.data.sendall(data)
