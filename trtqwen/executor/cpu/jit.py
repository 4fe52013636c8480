"""Compilation of the CPU kernels: once for each machine, cached on disk if a directory is writable."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit
from numba.extending import overload

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # infinities and NaN keep their meaning: a broken model must show


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function at its first call. Sums may be reordered, but for `fastmath=False`."""
    options.setdefault("fastmath", _FAST)

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            kernel = njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's directory nor the user's can be written to
            return njit(**options)(function)
        compile_alone, lock = kernel.compile, Path(kernel.stats.cache_path, f"{function.__qualname__}.lock")

        def compile_once(signature: Any) -> Any:
            with _locked(lock):  # ranks start together: one compiles for seconds, the others read what it caches
                return compile_alone(signature)

        kernel.compile = compile_once
        return kernel

    return decorate


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, unless it cannot be written: who reads a cache needs no lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def widen(value: Any) -> Any:
    """An element as float32: a float32, an int8, or the bits of a bfloat16 as uint16. Only for compiled code."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(value):  # type: ignore[no-untyped-def]  # Numba compares the signatures, annotations included
    if value == numba.types.float32:
        return lambda value: value
    if value == numba.types.int8:
        return lambda value: np.float32(value)
    if value == numba.types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return None
