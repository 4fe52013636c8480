"""Compile many kernels of the Triton language at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from triton import knobs


def compile_ahead(run: Callable[[], object], device: torch.device) -> int:
    """Compile the kernels that `run` launches, several at a time.

    The Triton language compiles each kernel at its first launch, one after the other. This function calls `run` with
    a hook that records each kernel that is not compiled yet and skips its launch. The results of `run` are
    meaningless, so `run` must not use a kernel's result as an index. Later launches of the recorded kernels compile
    nothing.

    Returns:
        The number of recorded kernels.
    """
    noted: dict[tuple[str, Any], Callable[[], object]] = {}

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel, data = fn.jit_function, compile["specialization_data"]
        noted[fn.name, key] = lambda: kernel.preload(data)
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before
    # The current device belongs to a thread, and a compiled kernel to the current device.
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for compiled in [pool.submit(preload) for preload in noted.values()]:
            compiled.result()
    return len(noted)
