"""The cache of compiled kernels: a file is used if it is intact and no other user could have written it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.model.kernels import isa, object_cache, openmp
from headrace.model.kernels.intrinsics import assembly
from tests.patience import PATIENCE_S


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "headrace"


def adding(number: int) -> Callable[[], Any]:
    """Builds a kernel that adds a number to its first argument, and calls OpenMP like all kernels."""

    def compile_it() -> Any:
        import numba
        from numba import carray, types

        thread, _ = openmp.thread_functions()

        @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
        def kernel(arguments: Any) -> None:
            if thread() == 0:
                carray(arguments, 1)[0] += number

        return kernel

    return compile_it


def never() -> Any:
    raise AssertionError("it was compiled again")


def result_of(kernel: object_cache.Kernel) -> int:
    numbers = np.array([40], dtype=np.int64)
    openmp.team().run(kernel.address, numbers, 2)
    return int(numbers[0])


def test_a_cached_kernel_is_loaded_and_computes_the_same(cache: Path) -> None:
    assert result_of(object_cache.load_or_compile("two", adding(2))) == 42
    assert result_of(object_cache.load_or_compile("two", never)) == 42
    assert len(list(cache.iterdir())) == 1


def test_each_name_has_a_separate_kernel(cache: Path) -> None:
    object_cache.load_or_compile("two", adding(2))
    assert result_of(object_cache.load_or_compile("three", adding(3))) == 43


def test_others_can_read_neither_file_nor_directory(cache: Path) -> None:
    object_cache.load_or_compile("two", adding(2))
    assert cache.stat().st_mode & 0o777 == 0o700
    assert next(cache.iterdir()).stat().st_mode & 0o777 == 0o600


def writable_by_others(path: Path) -> None:
    path.chmod(0o606)


def in_a_directory_writable_by_others(path: Path) -> None:
    path.parent.chmod(0o777)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "harm",
    [writable_by_others, in_a_directory_writable_by_others, a_link, torn, changed, empty],
    ids=lambda f: f.__name__,
)
def test_untrusted_files_are_compiled_again(cache: Path, harm: Callable[[Path], None]) -> None:
    object_cache.load_or_compile("two", adding(2))
    harm(next(cache.iterdir()))
    with pytest.raises(AssertionError, match="compiled again"):
        object_cache.load_or_compile("two", never)
    assert result_of(object_cache.load_or_compile("two", adding(2))) == 42


def test_nothing_is_written_to_a_cache_that_another_user_made(cache: Path, tmp_path: Path) -> None:
    """The link could lead to a directory of this user that another user chose."""
    target = tmp_path / "target"
    target.mkdir()
    cache.symlink_to(target)
    assert result_of(object_cache.load_or_compile("two", adding(2))) == 42
    assert not list(target.iterdir())
    cache.unlink()
    cache.mkdir()
    cache.chmod(0o777)
    assert result_of(object_cache.load_or_compile("two", adding(2))) == 42
    assert not list(cache.iterdir())


def test_a_relative_cache_directory_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another one for each working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert object_cache.cache_directory() == Path("~/.cache/headrace").expanduser()


def test_code_that_calls_a_missing_symbol_is_not_loaded(cache: Path) -> None:
    """LLVM would end the process."""
    object_cache.load_or_compile("two", adding(2))
    path = next(cache.iterdir())
    _, names, code = path.read_bytes().split(b"\n", 2)
    about = json.loads(names)
    assert "omp_get_thread_num" in about["calls"]
    about["calls"].append("no_such_function")
    names = json.dumps(about).encode()
    digest = object_cache.hashlib.sha256(names + code).hexdigest().encode()
    path.write_bytes(b"\n".join((digest, names, code)))
    with pytest.raises(AssertionError, match="compiled again"):
        object_cache.load_or_compile("two", never)


def test_a_kernel_that_allocates_memory_is_refused(cache: Path) -> None:
    def compile_it() -> Any:
        import numba
        from numba import carray, types

        @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
        def kernel(arguments: Any) -> None:
            own = np.ones(carray(arguments, 1)[0])
            carray(arguments, 1)[0] = own.sum()

        return kernel

    with pytest.raises(LookupError, match="may not allocate"):
        object_cache.load_or_compile("greedy", compile_it)
    assert not list(cache.glob("*.kernel"))


#: Run in a separate process: load a cached kernel, then compile with numba.
AFTERWARDS = """
import sys, numpy as np, torch
from headrace.model.kernels import intrinsics as native, object_cache as machine_code
from tests.patience import PATIENCE_S
from headrace.model.kernels.attention import decode_kernel
assert decode_kernel(8, torch.float32, "cpu") is not None
print("numba" in sys.modules)
import numba
@numba.njit
def count(n):
    return [i for i in range(n)], np.ones(n).sum()
assert count(3) == ([0, 1, 2], 3.0)
try:
    numba.njit(lambda i: [1][i])(5)
except IndexError:
    print("raised")
"""


def test_a_kernel_that_another_process_compiles_is_waited_for(cache: Path) -> None:
    object_cache.load_or_compile("two", adding(2))
    (kept,) = cache.iterdir()
    data = kept.read_bytes()
    kept.unlink()
    with open(kept.with_suffix(".lock"), "w") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(object_cache.load_or_compile, "two", never)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        object_cache._store(kept, data)
        other.close()
        assert result_of(waiting.result(timeout=PATIENCE_S)) == 42


def test_a_process_that_was_stopped_is_not_waited_for_long(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_cache, "WAIT_S", 0.1)
    object_cache.load_or_compile("two", adding(2))
    (kept,) = cache.iterdir()
    kept.unlink()
    with open(kept.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert result_of(object_cache.load_or_compile("two", adding(2))) == 42


def test_loading_a_kernel_does_not_need_numba_and_numba_works_afterwards(cache: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", AFTERWARDS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [["True", "raised"], ["False", "raised"]]


def test_a_kernel_is_compiled_even_if_it_cannot_be_cached(cache: Path) -> None:
    cache.parent.joinpath("headrace").write_text("a file where the directory should be")
    assert result_of(object_cache.load_or_compile("two", adding(2))) == 42


def test_the_cache_key_covers_sources_compiler_and_instruction_set(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = isa.chosen()
    before = object_cache._key("two", here)
    assert all(object_cache._key("two", other) != before for other in isa.LADDER if other.name != here.name)
    monkeypatch.setattr("headrace.model.kernels.object_cache.version", lambda _: "0.0.1")
    assert object_cache._key("two", here) != before
    monkeypatch.undo()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == "gemm_bf16_amx.py"))
    assert object_cache._key("two", here) != before
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_OPT", "0")
    assert object_cache._key("two", here) != before
    monkeypatch.undo()
    assert object_cache._key("two", here) == before


def test_the_clobber_cc_is_refused() -> None:
    with pytest.raises(ValueError, match="flags"):
        assembly("decq %rax", 0, "~{rax},~{cc}")


def test_nothing_is_compiled_on_the_lowest_rung(cache: Path) -> None:
    with pytest.raises(LookupError, match="'none'"):
        object_cache.load_or_compile("two", never, isa.find("none"))


def test_numba_compiles_for_this_cpu_after_a_kernel_for_another_instruction_set(cache: Path) -> None:
    from numba.core.registry import cpu_target

    before = cpu_target.target_context.codegen()
    lowest = isa.available()[-1]
    assert result_of(object_cache.load_or_compile("two", adding(2), lowest)) == 42
    assert cpu_target.target_context.codegen() is before
