"""Where data, sockets and the address of the embedded Redis server are."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from headrace.config import directories
from headrace.config.directories import (
    MAX_SOCKET_PATH,
    ServerAddress,
    data_dir,
    make_private,
    read_address,
    redis_dir,
    remove_address,
    runtime_dir,
    socket_for,
    write_address,
)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def belongs_to_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


def test_data_has_one_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data_dir() == tmp_path / ".local" / "share" / "headrace"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/path")
    assert data_dir() == tmp_path / ".local" / "share" / "headrace"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert data_dir() == tmp_path / "share" / "headrace"
    assert redis_dir() == tmp_path / "share" / "headrace" / "redis"


def test_sockets_are_in_a_directory_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert str(os.getuid()) in runtime_dir().name
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_dir() == tmp_path / "headrace"


def test_the_runtime_directory_of_another_user_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This happens after `sudo -E` and some forms of `su`."""
    theirs = tmp_path / "run"
    theirs.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    belongs_to_another_user(theirs, monkeypatch)
    assert theirs not in runtime_dir().parents


def test_each_data_directory_has_a_socket_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert socket_for(one) != socket_for(other)
    assert socket_for(one) == socket_for(tmp_path / "other" / ".." / "one")
    (tmp_path / "link").symlink_to(one)
    assert socket_for(tmp_path / "link") == socket_for(one)


def test_two_users_have_sockets_in_different_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = socket_for(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert socket_for(tmp_path).parent != mine.parent


@pytest.mark.parametrize("length", [10, 60, 100, 250])
def test_long_paths_have_short_sockets_that_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int
) -> None:
    deep = tmp_path.joinpath(*["x" * 100] * 5)
    base = tmp_path / ("r" * length)
    base.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(base))
    sockets = {socket_for(deep / name) for name in ("a", "b", "c")}
    assert len(sockets) == 3
    assert all(len(os.fsencode(socket)) <= MAX_SOCKET_PATH for socket in sockets)


def test_an_address_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_address(tmp_path) is None
    address = ServerAddress(7, "/run/with a \n and \udcff")
    write_address(tmp_path, address)
    assert read_address(tmp_path) == address
    remove_address(tmp_path)
    remove_address(tmp_path)
    assert read_address(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"pid": 1}', json.dumps({"pid": 1, "socket": "/s", "x": 1})])
def test_what_is_no_address_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "address").write_text(text)
    assert read_address(tmp_path) is None


def test_the_address_that_another_user_wrote_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_address(tmp_path, ServerAddress(7, "/run/s"))
    belongs_to_another_user(tmp_path / "address", monkeypatch)
    assert directories.read_address(tmp_path) is None


def test_an_address_is_for_this_user_alone(tmp_path: Path) -> None:
    write_address(tmp_path, ServerAddress(7, "/run/s"))
    assert not stat.S_IMODE((tmp_path / "address").stat().st_mode) & 0o022


# Directories that another user made or can change


def test_missing_parents_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


@pytest.mark.parametrize("group_may_write", [False, True])
@pytest.mark.parametrize("kind", ["link", "dangling link", "owner", "others write", "group writes", "file", "own link"])
def test_a_directory_that_another_user_made_or_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, group_may_write: bool
) -> None:
    place, target = tmp_path / "headrace-0", tmp_path / "target"
    target.mkdir(0o700)
    if "link" in kind:
        place.symlink_to(target if kind != "dangling link" else tmp_path / "nowhere")
        if os.getuid() == 0 and kind != "own link":
            os.chown(place, 12345, -1, follow_symlinks=False)
        elif kind != "own link":
            pytest.skip("only root can make the link of another user")
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod({"others write": 0o707, "group writes": 0o770}.get(kind, 0o700))
        if kind == "owner":
            belongs_to_another_user(place, monkeypatch)
    if group_may_write and kind in ("group writes", "own link"):
        make_private(place, group_may_write=True)
        return
    said = {"owner": "belongs to another user; set XDG_RUNTIME_DIR", "file": "Not a directory"}
    said |= dict.fromkeys(
        ["link", "dangling link", "own link"], "is a symbolic link; remove the link, or set XDG_RUNTIME_DIR"
    )
    said |= dict.fromkeys(["others write", "group writes"], "can be written by other users: run `chmod go-w")
    with pytest.raises(OSError, match=re.escape(said[kind])) as caught:
        make_private(place, group_may_write=group_may_write)
    assert str(place) in str(caught.value)
    assert not list(target.iterdir())


def test_an_address_that_others_can_change_or_that_is_a_link_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "address"
    write_address(tmp_path, ServerAddress(7, "/run/s"))
    path.chmod(0o606)
    assert read_address(tmp_path) is None
    path.chmod(0o600)
    assert read_address(tmp_path)
    path.rename(tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    assert read_address(tmp_path) is None
    path.unlink()
    (tmp_path / "real").rename(path)
    tmp_path.chmod(0o777)
    assert read_address(tmp_path) is None
