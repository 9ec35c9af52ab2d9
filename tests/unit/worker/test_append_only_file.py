"""Damaged files of the embedded Redis: what is intact is found and kept, and nothing is thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.append_only_file import Damage, find_damage, set_aside
from headrace.worker.redis_server import EmbeddedRedis, EmbeddedRedisError

pytestmark = pytest.mark.timeout(60)

ARITIES = {b"set": -3, b"del": -2, b"multi": 1, b"exec": 1, b"incr": 2}


def encoded(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


WORDS = st.binary(max_size=12)
COMMANDS = st.one_of(
    st.tuples(st.just(b"SET"), WORDS, WORDS),
    st.tuples(st.just(b"del"), WORDS),
    st.tuples(st.just(b"INCR"), WORDS),
).map(lambda words: encoded(*words))
#: One command, or a transaction of some.
UNITS = st.one_of(
    COMMANDS, st.lists(COMMANDS, max_size=3).map(lambda inner: encoded(b"MULTI") + b"".join(inner) + encoded(b"EXEC"))
)


@given(st.lists(UNITS, min_size=1, max_size=6), st.data())
def test_the_intact_part_is_whole_commands_before_the_damage(
    tmp_path_factory: pytest.TempPathFactory, units: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("aof")
    content = b"".join(units)
    path = folder / "appendonly.aof"
    path.write_bytes(content)
    assert find_damage(folder, ARITIES) is None
    ends = [sum(map(len, units[:count])) for count in range(len(units) + 1)]
    cut = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut])
    damage = find_damage(folder, ARITIES)
    assert (damage.intact if damage else cut) == max(end for end in ends if end <= cut)
    garbage = data.draw(st.binary(min_size=1, max_size=8).filter(lambda b: b[:1] not in b"*#"))
    at = data.draw(st.sampled_from(ends[:-1]))
    path.write_bytes(content[:at] + garbage + content[at:])
    damage = find_damage(folder, ARITIES)
    assert damage
    assert damage.intact == at
    changed = bytearray(content)
    changed[cut] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    damage = find_damage(folder, ARITIES)
    if damage:  # a changed byte of a value cannot be seen; nothing that precedes the damage is given up
        assert damage.intact in ends
        assert damage.intact >= max(end for end in ends if end <= cut)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    place = EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / "run" / "s")
    yield place
    place.stop()


@contextmanager
def connect(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as connection:
        yield connection


def aof(server: EmbeddedRedis) -> Path:
    """The file that the server appends to."""
    single = server.directory / "appendonly.aof"
    return single if single.exists() else max((server.directory / "appendonlydir").glob("*.incr.aof"))


def overwrite(data: bytes, at: int) -> bytes:
    return data[:at] + b"\x00" * 40 + data[at + 40 :]


def unknown_command(data: bytes, at: int) -> bytes:
    at = data.index(b"\r\nSET\r\n", at)
    return data[:at] + b"\r\nSEX\r\n" + data[at + 7 :]


def removed_block(data: bytes, at: int) -> bytes:
    return data[:at] + data[at + 33 :]


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("harm", [overwrite, unknown_command, removed_block], ids=lambda f: f.__name__)
def test_a_file_that_is_damaged_in_the_middle_is_set_aside_and_its_intact_part_is_used(
    server: EmbeddedRedis, harm: Callable[[bytes, int], bytes], rewritten: bool
) -> None:
    with server, connect(server) as connection:
        connection.set("first", "a" * 1000)
        if rewritten:
            connection.bgrewriteaof()
            while connection.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.01)
        for number in range(20):
            connection.set(f"key-{number}", "b" * 100)
    path = aof(server)
    intact = path.read_bytes()
    damaged = harm(intact, intact.index(b"key-10"))
    path.write_bytes(damaged)
    with pytest.raises(
        EmbeddedRedisError, match=r"is damaged at byte \d+ of \d+: the \d+ commands before it"
    ) as caught:
        server.start()
    assert "headrace up --repair-redis" in str(caught.value)
    assert "redis-check-aof" not in str(caught.value)
    assert path.read_bytes() == damaged
    said = server.repair()
    (aside,) = server.directory.glob("damaged-*")
    assert str(aside) in said
    assert (aside / path.name).read_bytes() == damaged
    with server, connect(server) as connection:
        assert connection.get("first") == "a" * 1000
        found = [connection.exists(f"key-{number}") for number in range(20)]
        assert found[:10] == [1] * 10
        assert found[12:] == [0] * 8
        connection.set("later", "works")
    assert "nothing in" in server.repair()
    with server, connect(server) as connection:
        assert connection.get("later") == "works"


def test_a_damaged_snapshot_is_set_aside_whole(server: EmbeddedRedis) -> None:
    with server, connect(server) as connection:
        for number in range(50):
            connection.set(f"key-{number}", "b" * 100)
        connection.bgrewriteaof()
        while connection.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.01)
    path = next(each for each in server.directory.rglob("*") if each.is_file() and each.read_bytes()[:5] == b"REDIS")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([255] * 30) + data[middle + 30 :])
    with pytest.raises(EmbeddedRedisError, match=r"damaged at byte 0 of .*--repair-redis"):
        server.start()
    server.repair()
    (aside,) = server.directory.glob("damaged-*")
    assert any(
        each.read_bytes()[middle : middle + 30] == bytes([255] * 30) for each in aside.rglob("*.*") if each.is_file()
    )
    with server, connect(server) as connection:
        assert connection.ping()


def test_later_files_of_redis_7_are_set_aside_with_the_damaged_one(tmp_path: Path) -> None:
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    (folder / "a.1.base.aof").write_bytes(encoded(b"SET", b"a", b"1"))
    (folder / "a.1.incr.aof").write_bytes(encoded(b"SET", b"b", b"1") + b"?" + encoded(b"SET", b"c", b"1"))
    (folder / "a.2.incr.aof").write_bytes(encoded(b"SET", b"d", b"1"))
    lines = ["file a.1.base.aof seq 1 type b\n", "file a.1.incr.aof seq 1 type i\n", "file a.2.incr.aof seq 2 type i\n"]
    (folder / "a.manifest").write_text("".join(lines))
    damage = find_damage(tmp_path, ARITIES)
    assert damage == Damage(folder / "a.1.incr.aof", 54 + 1, 27, 1)
    aside = set_aside(tmp_path, damage)
    assert (folder / "a.manifest").read_text() == "".join(lines[:2])
    assert (folder / "a.1.incr.aof").read_bytes() == encoded(b"SET", b"b", b"1")
    assert not (folder / "a.2.incr.aof").exists()
    assert {path.name for path in aside.iterdir()} == {"a.1.incr.aof", "a.2.incr.aof", "a.manifest"}
    assert find_damage(tmp_path, ARITIES) is None
