"""Compiled kernels kept on disk: the first process of a user compiles them, those after it start seconds sooner.

numba has a cache of its own, but reads it with pickle. Here a kernel is a file of three parts: a digest, names as JSON,
and the object code as LLVM wrote it. Whoever can write that file decides what this process runs, as with Python's own
`__pycache__`; so it is read only where nobody but its owner, who is the user of this process, could have written.

The process that compiles runs the same object code as those after it. What numba made callable is not that: numba
compiles every inner function by itself too, and LLVM takes the first it finds of two with one name, with another order
of additions in it. Results would then hang on who compiled.

A kernel allocates nothing and raises nothing, so that numba, whose import takes a third of a second, is needed by the
process that compiles alone. Code for errors is there all the same; if it ever ran, it would end the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headrace.model.kernels.intrinsics import team

log = logging.getLogger("headrace.model")

#: No kernel of ours comes near it.
MAX_BYTES = 2**22
#: How the names begin of what numba's runtime has; and of those parts of it that give memory.
RUNTIME, ALLOCATES = ("NRT_", "numba_"), ("NRT_MemInfo_alloc", "NRT_Allocate")
#: LLVM compiles and loads one thing at a time.
_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Kernel:
    """A C function of one pointer, to int64 numbers."""

    address: int
    #: What the code lives in.
    owner: Any


def kernel(name: str, compile_it: Callable[[], Any]) -> Kernel:
    """What `compile_it`, which gives a `numba.cfunc`, compiled for this machine: now, or in an earlier process.

    `name` tells apart what the same sources compile to. Raises what compiling raises.
    """
    team()  # the code calls OpenMP, and LLVM ends the process if it cannot find what code calls
    with _one_at_a_time:
        path = cache_directory() / f"{_key(name)}.kernel"
        found = _load(path)
        if found is None:
            data = _packed(compile_it())
            found = _unpacked(data)
            _store(path, data)
    return found


def cache_directory() -> Path:
    """Where kernels are kept: `$XDG_CACHE_HOME/headrace`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "headrace"


def _key(name: str) -> str:
    """A name for what these sources are compiled to by this compiler for this processor."""
    from llvmlite import binding

    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    processor = binding.get_process_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    versions = (version("numba"), version("llvmlite"), platform.python_version(), *processor)
    return hashlib.sha256(b"\0".join([*sources, repr((name, versions)).encode()])).hexdigest()[:40]


def _load(path: Path) -> Kernel | None:
    try:
        data = _read(path)
        return None if data is None else _unpacked(data)
    except Exception as error:  # compiling again is always right
        log.warning("a kept kernel is not used, and compiled again: %s: %r", path, error)
        return None


def _packed(function: Any) -> bytes:
    """A compiled `numba.cfunc` as it is kept."""
    _, _, (code, _) = function._library.serialize_using_object_code()
    calls = re.findall(r"^declare [^@]*@(?!llvm\.)([\w.]+)\(", function._library.get_llvm_str(), re.MULTILINE)
    if allocating := [symbol for symbol in calls if symbol.startswith(ALLOCATES)]:
        raise LookupError(f"a kernel may not allocate: {allocating}")
    names = json.dumps({"function": function._wrapper_name, "calls": calls}).encode()
    return b"\n".join((hashlib.sha256(names + code).hexdigest().encode(), names, code))


def _unpacked(data: bytes) -> Kernel:
    """Object code made callable, in a space of names of its own: what two processes compiled has names in common."""
    from llvmlite import binding

    digest, names, code = data.split(b"\n", 2)
    if hashlib.sha256(names + code).hexdigest().encode() != digest:
        raise ValueError("it is damaged")
    about = json.loads(names)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)  # finds what this process has, from now
    if missing := [symbol for symbol in about["calls"] if not _found(symbol)]:
        raise LookupError(f"it calls what is not there: {missing}")
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Kernel(engine.get_function_address(about["function"]), engine)


def _found(symbol: str) -> bool:
    """Whether LLVM knows where it is; it would end the process if it did not.

    For what numba's runtime has stands what ends the process too, but only if it is called, and until numba is there.
    """
    from llvmlite import binding

    if binding.address_of_symbol(symbol) is None and symbol.startswith(RUNTIME):
        binding.add_symbol(symbol, ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value)
    return binding.address_of_symbol(symbol) is not None


def _read(path: Path) -> bytes | None:
    """The file, if there is one that nobody else can have written."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(file, "rb") as stream:
        for about in (path.parent.lstat(), os.fstat(file)):
            if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
                raise PermissionError("others could have written it")
        return stream.read(MAX_BYTES)


def _store(path: Path, data: bytes) -> None:
    """Keep a kernel. Where that cannot be done, a read-only home say, nothing is lost but time at the next start."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:  # only this user may read it
            stream.write(data)
        os.replace(stream.name, path)
    except OSError as error:
        log.debug("a compiled kernel is not kept: %s: %r", path, error)
