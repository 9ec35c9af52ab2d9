"""A cache of compiled kernels on disk: the first process of a user compiles them, later ones start seconds faster.

numba's own cache is read with pickle, so it is not used. Here a kernel is a file of three parts: a digest, symbol names
as JSON, and LLVM's object code. Anyone who can write that file controls this process, as with Python's `__pycache__`.
Therefore a file is read only if it and its directory belong to the user of this process and nobody else can write them.

The process that compiles a kernel runs the same object code as later processes. It does not run the function that numba
made callable: numba also compiles each inner function separately, and LLVM links the first of two symbols with the same
name, whose additions may be in another order. Results would then depend on which process compiled.

A kernel allocates no memory and raises no exceptions, so only the process that compiles needs numba, whose import takes
a third of a second. numba still generates error paths; if one were ever reached, it would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headrace.model.kernels.isa import NONE, Isa, chosen
from headrace.model.kernels.openmp import team
from headrace.model.kernels.target import compiling_for

log = logging.getLogger("headrace.model")

#: Larger files are not read to the end; no kernel comes near this size.
MAX_BYTES = 2**22
#: Prefixes of the symbols of numba's runtime, and of those among them that allocate memory.
RUNTIME, ALLOCATES = ("NRT_", "numba_"), ("NRT_MemInfo_alloc", "NRT_Allocate")
#: Seconds that a process waits for another one that compiles the same kernel; it may have been stopped.
WAIT_S = 60.0
#: LLVM is not thread-safe.
_lock = threading.RLock()


@dataclass(frozen=True)
class Kernel:
    """A C function of one pointer to int64 words."""

    address: int
    #: The LLVM engine that holds the code; it must stay alive.
    owner: Any


def load_or_compile(name: str, compile_function: Callable[[], Any], isa: Isa | None = None) -> Kernel:
    """Load a kernel from the cache, or compile it and add it to the cache.

    Args:
        name: distinguishes kernels that are compiled from the same sources.
        compile_function: compiles the kernel and returns a `numba.cfunc`. What it raises is raised here.
        isa: the instruction set to compile for; by default the one of this process.

    Raises:
        LookupError: the instruction set is `none`.
    """
    isa = isa or chosen()
    if isa.name == NONE:
        raise LookupError(f"no kernels are compiled for the instruction set {isa.name!r}")
    team()  # loads OpenMP: LLVM ends the process if a symbol that the code calls is missing
    with _lock:
        path = cache_directory() / f"{_key(name, isa)}.kernel"
        found = _load(path)
        if found is None:
            with _alone(path):
                found = _load(path)  # another process may have compiled it meanwhile
                if found is None:
                    with compiling_for(isa):
                        data = _packed(compile_function())
                    found = _unpacked(data)
                    _store(path, data)
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process compile a kernel while the others wait, for at most WAIT_S, instead of doing the same."""
    lock = path.with_suffix(".lock")
    try:
        _make_directories(path.parent)
        _check_owner(path.parent.lstat(), path.parent)
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # without a cache each process compiles
        yield
        return
    try:
        deadline = time.monotonic() + WAIT_S
        while not _locked(file) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def load_tested(
    name: str, compile_function: Callable[[], Any], self_test: Callable[[Kernel], bool], instead: str
) -> Kernel | None:
    """Load or compile a kernel, and test it. None where torch must be used; a warning then says so.

    Args:
        self_test: whether the kernel gives right results.
        instead: what is used without the kernel, as the warning says it: "argmax uses torch's operator".
    """
    try:
        kernel = load_or_compile(name, compile_function)
        if not self_test(kernel):
            raise RuntimeError("its results are wrong")
    except Exception as error:  # an optimization must never keep a model from running
        log.warning("%s, which is slower: %r", instead, error)
        return None
    return kernel


def cache_directory() -> Path:
    """The directory of the cache: `$XDG_CACHE_HOME/headrace`, by default `~/.cache/headrace`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path would be another directory for each working directory, perhaps one of another user.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "headrace"


def _key(name: str, isa: Isa) -> str:
    """A file name that depends on the sources of all kernels, on compiler and settings, and on the instruction set."""
    from llvmlite import binding

    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    target = binding.get_process_triple(), isa.name, isa.cpu, isa.features
    versions = (version("numba"), version("llvmlite"), platform.python_version(), *target)
    # numba's own settings, which change the code; else what one process compiles with them, all later ones would run.
    options = sorted((key, value) for key, value in os.environ.items() if key.startswith("NUMBA_"))
    with contextlib.suppress(OSError), open(".numba_config.yaml", "rb") as file:
        sources.append(file.read(MAX_BYTES))
    return hashlib.sha256(b"\0".join([*sources, repr((name, versions, options)).encode()])).hexdigest()[:40]


def _load(path: Path) -> Kernel | None:
    try:
        data = _read(path)
        return None if data is None else _unpacked(data)
    except Exception as error:  # compiling again is always possible
        log.warning("a cached kernel cannot be used and is compiled again: %s: %r", path, error)
        return None


def _packed(function: Any) -> bytes:
    """A compiled `numba.cfunc` as the bytes of a cache file."""
    _, _, (code, _) = function._library.serialize_using_object_code()
    calls = re.findall(r"^declare [^@]*@(?!llvm\.)([\w.]+)\(", function._library.get_llvm_str(), re.MULTILINE)
    if allocating := [symbol for symbol in calls if symbol.startswith(ALLOCATES)]:
        raise LookupError(f"a kernel may not allocate memory: {allocating}")
    names = json.dumps({"function": function._wrapper_name, "calls": calls}).encode()
    return b"\n".join((hashlib.sha256(names + code).hexdigest().encode(), names, code))


def _unpacked(data: bytes) -> Kernel:
    """Load object code. Each kernel has an LLVM engine of its own, because kernels have symbol names in common."""
    from llvmlite import binding

    digest, names, code = data.split(b"\n", 2)
    if hashlib.sha256(names + code).hexdigest().encode() != digest:
        raise ValueError("the file is damaged")
    about = json.loads(names)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(
        binding.parse_assembly(""), machine
    )  # from now on LLVM finds the symbols of this process
    if missing := [symbol for symbol in about["calls"] if not _found(symbol)]:
        raise LookupError(f"it calls symbols that are missing: {missing}")
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Kernel(engine.get_function_address(about["function"]), engine)


def _found(symbol: str) -> bool:
    """Whether LLVM can resolve a symbol; if it could not, it would end the process.

    A symbol of numba's runtime is resolved to `abort`, which ends the process only if it is called.
    """
    from llvmlite import binding

    if binding.address_of_symbol(symbol) is None and symbol.startswith(RUNTIME):
        binding.add_symbol(symbol, ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value)
    return binding.address_of_symbol(symbol) is not None


def _read(path: Path) -> bytes | None:
    """The contents of a file; None if it is missing. Raises PermissionError if another user could have written it."""
    try:
        _check_owner(path.parent.lstat(), path.parent)
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(file, "rb") as stream:
        _check_owner(os.fstat(file), path)
        return stream.read(MAX_BYTES)


def _check_owner(about: os.stat_result, place: Path) -> None:
    if stat.S_ISLNK(about.st_mode) or about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise PermissionError(
            f"{place} is a link, belongs to another user, or can be written by others: remove it, or run "
            f"`chmod go-w {place}`"
        )


def _store(path: Path, data: bytes) -> None:
    """Add a kernel to the cache. A failure, for example a read-only home, only costs time at the next start."""
    try:
        _make_directories(path.parent)
        _check_owner(path.parent.lstat(), path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:  # only this user may read it
            stream.write(data)
        os.replace(stream.name, path)
    except OSError as error:
        log.debug("a compiled kernel is not cached: %s: %r", path, error)


def _make_directories(place: Path) -> None:
    """Create a directory and its missing parents, each for this user alone."""
    for each in reversed((place, *place.parents)):
        if not os.path.lexists(each):
            each.mkdir(mode=0o700, exist_ok=True)
