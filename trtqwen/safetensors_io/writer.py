"""Streams safetensors files: the upstream library has no writer that needs less memory than the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtqwen.safetensors_io.block_file import BlockFile
from trtqwen.safetensors_io.format import BLOCK_BYTES, NUMPY_DTYPES, Array, TensorSpec, header_bytes

_RESIDENT_BYTES = 64 << 20
_BFLOAT16 = NUMPY_DTYPES["BF16"]


class SafetensorsWriter:
    """Writes a safetensors file front to back: the header first, then each tensor in the order of the plan.

    Hashing and writing go on in a thread while the caller makes the next block; resident are two buffers and one
    block of a tensor (`BLOCK_BYTES`, or one row where that is larger). Use as a context manager: leaving it
    normally checks that the plan was fulfilled and syncs the file.

    Args:
        path: file to create.
        plan: every tensor of the file, in the order of its bytes.
        metadata: texts for the header; transformers reads only files that name their `format`.
    """

    def __init__(self, path: Path, plan: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._pending = list(plan.items())
        self._pending.reverse()
        header = header_bytes(plan, metadata)
        self.size = len(header) + sum(spec.nbytes for spec in plan.values())
        self._file = BlockFile(path)
        self._file.append(np.frombuffer(header, np.uint8))

    def write(self, name: str, parts: Sequence[Array], via: np.dtype[Any] | None = None) -> None:
        """Append the next tensor; see `write_to_all`."""
        write_to_all([self], name, parts, via)

    def digest(self) -> str:
        """XXH3-128 of the file, as 32 hex digits; after it was closed."""
        return self._file.digest.hexdigest()

    def _take(self, name: str, parts: Sequence[Array]) -> TensorSpec:
        """The spec of the next tensor of the plan, which is to be `name`, made of `parts`."""
        expected, spec = self._pending[-1] if self._pending else ("the end of the file", None)
        if spec is None or name != expected:
            raise ValueError(f"{self.path}: {name!r} written where {expected!r} is due")
        rows = sum(part.shape[0] for part in parts) if spec.shape else 1
        if rows != (spec.shape[0] if spec.shape else 1) or any(part.shape[1:] != spec.shape[1:] for part in parts):
            raise ValueError(f"{self.path}: {name!r} has parts {[p.shape for p in parts]}, planned {spec.shape}")
        self._pending.pop()
        return spec

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close(sync=kind is None)
        if kind is None and self._pending:
            raise ValueError(f"{self.path}: {len(self._pending)} planned tensors were never written")


def write_to_all(
    writers: Sequence[SafetensorsWriter],
    name: str,
    parts: Sequence[Array],
    via: np.dtype[Any] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Append the next tensor to files that share it: parts to be joined along the first axis, cast once as planned.

    Args:
        via: round to this dtype first.
        progress: called with the bytes written since the last call, for every 64 MiB of a file and at the end.

    Raises:
        ValueError: if `name` is not the next tensor of a plan or the parts do not fill its shape.
        OSError: if the disk is full or fails.
    """
    specs = [writer._take(name, parts) for writer in writers]
    spec = specs[0]
    unreported = 0
    for part in parts:
        for block in _row_blocks(part, spec.dtype.itemsize):
            block = block if via is None else _cast(block, via)
            data = _cast(block, spec.dtype).reshape(-1).view(np.uint8)
            for writer in writers:
                writer._file.append(data)
            unreported += len(data)
            if unreported >= _RESIDENT_BYTES:
                progress(unreported * len(writers))
                unreported = 0
    progress(unreported * len(writers))


def _cast(block: Array, dtype: np.dtype[Any]) -> Array:
    """Contiguous, rounded to `dtype`."""
    if block.dtype != _BFLOAT16 or dtype != np.float16 or not block.ndim:
        return np.ascontiguousarray(block, dtype=dtype)
    # In integers: faster than the library's cast, and other threads run meanwhile. A bfloat16 that is neither too
    # small nor too large for a normal float16 keeps its 7 bits of mantissa; its exponent is rebased from 127 to 15.
    bits = block.view(np.uint16)
    sign = bits & np.uint16(0x8000)
    half = bits ^ sign
    others = np.flatnonzero((half - np.uint16(113 << 7)) >= np.uint16(30 << 7))
    half <<= np.uint16(3)
    half -= np.uint16(112 << 10 & 0xFFFF)
    half |= sign
    half.reshape(-1)[others] = block.reshape(-1)[others].astype(np.float16).view(np.uint16)
    return half.view(np.float16)


def _row_blocks(array: Array, itemsize: int) -> Iterator[Array]:
    if array.ndim < 2:
        yield array
        return
    rows = max(1, BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]
