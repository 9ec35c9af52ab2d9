"""Finds where the embedded Redis server's append-only file is damaged, and keeps what is intact.

Redis itself repairs only a file whose end is missing. For any other damage it refers to `redis-check-aof`, which the
package of the embedded server does not contain.

The file is a list of commands: `*<number of words>`, then `$<length>` and the bytes of each word, each line ended by CR
LF. It may begin with a snapshot, which has a format of its own. Since Redis 7 there are several such files, in the
order of a manifest.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: `proto-max-bulk-len` and the number of words that Redis accepts.
MAX_WORD_BYTES, MAX_WORDS = 2**29, 2**20
SNAPSHOT = b"REDIS"
#: The end of a snapshot: an opcode and a checksum, then the first command.
SNAPSHOT_END = re.compile(rb"\xff.{8}(?=\*\d{1,7}\r\n\$\d{1,9}\r\n)", re.DOTALL)
#: What Redis logs when it cannot read a snapshot.
SNAPSHOT_ERRORS = re.compile(
    r"Internal error in RDB|RDB CRC error|Wrong signature|Short read or OOM|Error reading the RDB preamble|"
    r"Unrecoverable error reading|file reading failure"
)


@dataclass(frozen=True)
class Damage:
    """Where a file is damaged: `intact` bytes, which hold `commands`, precede it."""

    path: Path
    size: int
    intact: int
    commands: int

    def __str__(self) -> str:
        return (
            f"{self.path} is damaged at byte {self.intact} of {self.size}: the {self.commands} commands before it can "
            f"be read, what was written later ({self.size - self.intact} bytes) is lost"
        )


def find_damage(directory: Path, arities: Mapping[bytes, int], log: str = "") -> Damage | None:
    """The first damage in the append-only files of a data directory; None if every command can be read.

    Args:
        arities: the commands of the server that will read the files, in lower case, as its command COMMAND reports
            them: the number of words, or minus the smallest number.
        log: what the server logged; an error about a snapshot counts as damage at byte 0.
    """
    for path in _files(directory):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            snapshot = file.read(len(SNAPSHOT)) == SNAPSHOT
            start = _end_of_snapshot(file) if snapshot else 0
            intact, commands = (size, 0) if start is None else _scan(file, start, size, arities)
        if intact < size:
            return Damage(path, size, intact, commands)
        if snapshot and SNAPSHOT_ERRORS.search(log):
            return Damage(path, size, 0, 0)
    return None


def set_aside(directory: Path, damage: Damage) -> Path:
    """Keep the damaged file, and those that Redis would read after it, in a new directory; leave the intact part.

    Returns the new directory. Raises OSError if there is no space; the files are unchanged then.
    """
    aside = directory / time.strftime("damaged-%Y%m%d-%H%M%S")
    aside.mkdir(mode=0o700)
    files = _files(directory)
    if damage.intact == 0 and damage.path.parent != directory:  # commands that follow a lost snapshot would be wrong
        damage.path.parent.rename(aside / damage.path.parent.name)
        return aside
    part = damage.path.with_name(f"{damage.path.name}.part")
    with damage.path.open("rb") as source, part.open("xb") as target:
        _copy(source, target, damage.intact)
    for later in files[files.index(damage.path) + 1 :]:
        shutil.copy2(later, aside)
    os.link(damage.path, aside / damage.path.name)
    part.replace(damage.path)
    if damage.path.parent != directory:
        _forget(damage.path.parent, files[files.index(damage.path) + 1 :], aside)
    return aside


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, 2**20))
        target.write(data)
        size -= len(data)
    target.flush()
    os.fsync(target.fileno())


def _forget(directory: Path, later: list[Path], aside: Path) -> None:
    """Remove the later files from the manifest, which is kept as it was."""
    (manifest,) = directory.glob("*.manifest")
    shutil.copy2(manifest, aside)
    names = {path.name for path in later}
    kept = [line for line in manifest.read_text().splitlines(keepends=True) if line.split(" ")[1] not in names]
    part = manifest.with_name(f"{manifest.name}.part")
    part.write_text("".join(kept))
    part.replace(manifest)
    for path in later:
        path.unlink()


def _files(directory: Path) -> list[Path]:
    """The append-only files in the order in which Redis reads them."""
    manifests = list((directory / "appendonlydir").glob("*.manifest"))
    if not manifests:
        single = directory / "appendonly.aof"
        return [single] if single.is_file() else []
    entries = []
    for line in manifests[0].read_text(errors="replace").splitlines():
        words = dict(zip(*[iter(line.split(" "))] * 2, strict=False))
        if words.get("type") in ("b", "i") and words.get("seq", "").isdigit():
            entries.append((words["type"], int(words["seq"]), directory / "appendonlydir" / Path(words["file"]).name))
    return [path for *_, path in sorted(entries) if path.is_file()]


def _end_of_snapshot(file: BinaryIO) -> int | None:
    """The position of the first command after a snapshot; None if there is none."""
    file.seek(0)
    position, data = 0, b""
    while part := file.read(2**20):
        data += part
        if match := SNAPSHOT_END.search(data):
            return position + match.end()
        position, data = position + len(data) - len(data[-64:]), data[-64:]
    return None


def _scan(file: BinaryIO, start: int, size: int, arities: Mapping[bytes, int]) -> tuple[int, int]:
    """The end of the last intact command, and how many there are up to it; a transaction counts when it is whole."""
    file.seek(start)
    intact, commands, transaction = start, 0, 0
    while (words := _command(file, size)) is not None:
        count, name = words
        arity = arities.get(name)
        if count and (arity is None or (count != arity if arity >= 0 else count < -arity)):
            break
        transaction += bool(count) and (name == b"multi" or transaction > 0)
        if name == b"exec":
            commands, transaction = commands + transaction - 1, 0
        if not transaction:
            intact, commands = file.tell(), commands + bool(count)
    return intact, commands


def _command(file: BinaryIO, size: int) -> tuple[int, bytes] | None:
    """Read a command: its number of words and its name, in lower case; 0 and b"" for a comment. None at the end."""
    if (line := file.readline(1024)).startswith(b"#") and line.endswith(b"\n"):
        return 0, b""
    count = _number(line, b"*", MAX_WORDS)
    if not count:
        return None
    name = b""
    for index in range(count):
        length = _number(file.readline(32), b"$", MAX_WORD_BYTES)
        if length is None or file.tell() + length + 2 > size:
            return None
        if index == 0:
            name = file.read(min(length, 64)).lower()
            length -= len(name)
        file.seek(length, os.SEEK_CUR)
        if file.read(2) != b"\r\n":
            return None
    return count, name


def _number(line: bytes, mark: bytes, largest: int) -> int | None:
    digits = line.removeprefix(mark).removesuffix(b"\r\n")
    if len(digits) + 3 != len(line) or not digits.isdigit() or len(digits) > 9 or int(digits) > largest:
        return None
    return int(digits)
