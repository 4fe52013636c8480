"""Reads safetensors files without holding more than the tensors in work."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trtqwen.diagnostics import InputError
from trtqwen.safetensors_io.format import BLOCK_BYTES, NUMPY_DTYPES, Array, Entry, TensorSpec, read_header

_FLOATS = tuple(NUMPY_DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))


class SafetensorsReader:
    """A safetensors file; nothing is loaded ahead.

    Args:
        mapped: `tensor` returns views of the mapped file, which cost no memory of their own. If another process cuts
            such a file short, the kernel kills a process that touches the view (SIGBUS). Otherwise `tensor` returns
            copies, and such a file is an error.

    Raises:
        error: (the given class, `InputError` by default) if the file is missing, cut short, or not safetensors.
    """

    def __init__(self, path: Path, error: type[InputError] = InputError, *, mapped: bool = True) -> None:
        self.path = path
        self.mapped = mapped
        self._error = error
        try:
            with path.open("rb") as file:
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
                self.size = os.fstat(file.fileno()).st_size
                self._entries, self._data_start, self.header_bytes = read_header(file, self.size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise error(
                f"{path}: cannot be read ({problem.strerror})", "check the path and its permissions"
            ) from None
        except ValueError as problem:
            raise error(f"{path}: {problem}", "copy or download the file again") from None

    def __iter__(self) -> Iterator[str]:
        """Tensor names in the order of their bytes in the file."""
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def spec(self, name: str) -> TensorSpec:
        return self._entry(name).spec

    def tensor(self, name: str) -> Array:
        """The tensor as a read-only array (bfloat16 as `ml_dtypes.bfloat16`)."""
        entry = self._entry(name)
        start = self._data_start + entry.begin
        count = math.prod(entry.spec.shape)
        if self.mapped:
            return np.frombuffer(self._map, entry.spec.dtype, count, start).reshape(entry.spec.shape)
        values = self._copied(entry.spec.dtype, count, start).reshape(entry.spec.shape)
        values.flags.writeable = False
        return values

    def rows(self, name: str, indices: Sequence[int]) -> Array:
        """A copy of some rows of the tensor, along its first axis; reads nothing else."""
        entry = self._entry(name)
        shape = entry.spec.shape[1:]
        values = np.empty((len(indices), *shape), entry.spec.dtype)
        length = math.prod(shape) * entry.spec.dtype.itemsize
        for row, index in zip(values.reshape(len(indices), -1).view(np.uint8), indices, strict=True):
            self._read_into(row, self._data_start + entry.begin + index * length)
        return values

    def blocks(self, name: str, rows: int) -> Iterator[Array]:
        """Copies of the tensor's rows along its first axis, `count` at a time; a scalar is one row."""
        entry = self._entry(name)
        shape = entry.spec.shape or (1,)
        width = math.prod(shape[1:])
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            at = self._data_start + entry.begin + start * width * entry.spec.dtype.itemsize
            yield self._copied(entry.spec.dtype, count * width, at).reshape(count, *shape[1:])

    def examine(self, name: str) -> tuple[str, float]:
        """Read the tensor: XXH3-128 of its bytes, as 32 hex digits, and its largest magnitude.

        The magnitude is nan or inf if one of the values is; it is 0 for integers, which have no such values.
        """
        entry = self._entry(name)
        dtype, count = entry.spec.dtype, math.prod(entry.spec.shape)
        digest, largest = xxhash.xxh3_128(), 0
        step = BLOCK_BYTES // dtype.itemsize
        buffer = np.empty(min(step, count), dtype)
        for start in range(0, count, step):
            block = buffer[: count - start]
            self._read_into(block.view(np.uint8), self._data_start + entry.begin + start * dtype.itemsize)
            digest.update(block.view(np.uint8).data)
            largest = max(largest, _largest_bits(block))
        unsigned = np.dtype(f"u{dtype.itemsize}")
        floating = dtype in _FLOATS
        return digest.hexdigest(), float(np.array(largest, unsigned).view(dtype)) if floating else 0.0

    def file_digest(self, tensor_digests: Mapping[str, str]) -> str:
        """Digest of the whole file, from its header and the digests of its tensors."""
        state = xxhash.xxh3_128(self.header_bytes)
        for name in self._entries:
            state.update(bytes.fromhex(tensor_digests[name]))
        return state.hexdigest()

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system, so that a long pass stays small in resident memory."""
        entry = self._entry(name)
        begin = -(-(self._data_start + entry.begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self._data_start + entry.end - begin
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def _copied(self, dtype: np.dtype[Any], count: int, start: int) -> Array:
        values = np.empty(count, dtype)
        self._read_into(values.view(np.uint8), start)
        return values

    def _read_into(self, target: Array, start: int) -> None:
        """Fill an array of bytes from a place in the file."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:].data], start + done)
            except OSError as problem:
                raise self._error(f"{self.path}: cannot be read ({problem.strerror})", "check the disk") from None
            if not count:
                what = f"{self.path}: was cut short while it was read"
                raise self._error(what, "wait until the file is complete, and run the command again")
            done += count

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._error(f"{self.path}: has no tensor {name!r}", "the file does not fit its index") from None


def _largest_bits(block: Array) -> int:
    """Bits of the largest magnitude of a float block; magnitudes order as their bits do, infinities and nan last."""
    if block.dtype not in _FLOATS:
        return 0
    unsigned = block.view(f"u{block.itemsize}")
    sign = 1 << (8 * block.itemsize - 1)
    # Positive numbers lead as signed integers, negative ones as unsigned: two passes, no memory.
    return max(int(unsigned.view(f"i{block.itemsize}").max()), int(unsigned.max()) & (sign - 1))
