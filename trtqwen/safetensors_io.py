"""Reading and streaming the safetensors format without holding more than the tensors in work.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes back to back, row major, little endian. The
upstream library reads files but has no streaming writer, so both ends live here, side by side.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from trtqwen.diagnostics import InputError

Array = npt.NDArray[Any]

_BLOCK_BYTES = 1 << 19  # cast at a time: stays in a core's cache
_BUFFER_BYTES = 4 << 20  # written at a time
LARGE_BYTES = 256 << 20  # passes over larger tensors give their pages back on the way
_RESIDENT_BYTES = 64 << 20
_HEADER_LIMIT = 100_000_000  # the upstream library refuses larger headers
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_BFLOAT16 = _NUMPY_DTYPES["BF16"]
_FLOATS = tuple(_NUMPY_DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
_OPAQUE = np.dtype("V1")  # of a dtype that numpy does not have: the tensor is a row of bytes
_FORMAT_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor, as a header states them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    spec: TensorSpec
    begin: int
    end: int


class SafetensorsReader:
    """A safetensors file; nothing is loaded ahead.

    Args:
        mapped: `tensor` returns views of the mapped file, which cost no memory of their own. If another process cuts
            such a file short, the kernel kills whoever touches the view (SIGBUS). Otherwise `tensor` returns copies,
            and such a file is an error.

    Raises:
        error: (the class given; `InputError` unless told) if the file is missing, cut short, or not safetensors.
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
                self._entries, self._data_start, self.header_bytes = _read_header(file, self.size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem.strerror}); check the path and its rights") from None
        except ValueError as problem:
            raise error(f"{path}: {problem}; copy or download the file again") from None

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
        """Copies of the tensor's rows along its first axis, so many at a time; a scalar is one row."""
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
        step = _BLOCK_BYTES // dtype.itemsize
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

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._error(f"{self.path}: has no tensor {name!r}", "the file does not fit its index") from None


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, _Entry], int, bytes]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"is cut short ({size} bytes, no header)")
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT:
        raise ValueError("is not a safetensors file (its header length makes no sense)")
    if 8 + length > size:
        raise ValueError(f"is cut short ({size} bytes, the header alone needs {8 + length})")
    raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: _parse_entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise ValueError("is not a safetensors file (its header is not the expected JSON)") from None
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].begin))
    end = 0
    for name, entry in ordered.items():
        if entry.begin != end:
            raise ValueError(f"is damaged (tensor {name!r} does not start where the one before it ends)")
        end = entry.end
    if 8 + length + end != size:
        raise ValueError(f"is cut short or damaged ({size} bytes, its header asks for {8 + length + end})")
    return ordered, 8 + length, raw


def _parse_entry(name: str, entry: dict[str, Any]) -> _Entry:
    dtype = _NUMPY_DTYPES.get(entry["dtype"], _OPAQUE)
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"]) if dtype is not _OPAQUE else (end - begin,)
    spec = TensorSpec(shape, dtype)
    if min(shape, default=0) < 0 or end - begin != spec.nbytes:
        raise ValueError(f"is damaged (tensor {name!r}: {end - begin} bytes do not hold shape {list(shape)})")
    return _Entry(spec, begin, end)


class SafetensorsWriter:
    """Writes a safetensors file front to back: the header first, then each tensor in the order of the plan.

    Hashing and writing go on in a thread while the caller makes the next block; resident are two buffers and one
    block of a tensor (`_BLOCK_BYTES`, or one row where that is larger). Use as a context manager: leaving it
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
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, spec in plan.items():
            begin, end = end, end + spec.nbytes
            header[name] = {
                "dtype": _FORMAT_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the data section starts aligned to 8 bytes, as upstream writes it
        self.size = 8 + len(raw) + end
        self._file = _BlockFile(path)
        self._file.append(np.frombuffer(len(raw).to_bytes(8, "little") + raw, np.uint8))

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


class _BlockFile:
    """A file written front to back in large aligned blocks, by a thread, past the page cache where that is possible.

    What is written once and not read back soon would only push the model being read out of the cache.
    """

    def __init__(self, path: Path) -> None:
        self.digest = xxhash.xxh3_128()
        self._descriptor, self._direct = _open_direct(path)
        self._problem: OSError | None = None
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()  # maps are aligned to pages, as direct writes ask
        self._full: SimpleQueue[tuple[mmap.mmap, int] | None] = SimpleQueue()
        for _ in range(2):
            self._free.put(mmap.mmap(-1, _BUFFER_BYTES))
        self._buffer, self._used = self._free.get(), 0
        self._thread = Thread(target=self._drain, daemon=True)
        self._thread.start()

    def append(self, data: npt.NDArray[np.uint8]) -> None:
        """Copy bytes into the buffer; raises the thread's OSError, if it had one."""
        while len(data):
            count = min(len(data), _BUFFER_BYTES - self._used)
            np.frombuffer(self._buffer, np.uint8, count, self._used)[:] = data[:count]
            self._used += count
            data = data[count:]
            if self._used == _BUFFER_BYTES:
                self._full.put((self._buffer, self._used))
                self._buffer, self._used = self._free.get(), 0
                if self._problem:
                    raise self._problem

    def close(self, *, sync: bool) -> None:
        """Write what is left and end the thread.

        Args:
            sync: wait until the file is on the disk; otherwise what it holds does not matter.
        """
        if sync:
            self._full.put((self._buffer, self._used))
        self._full.put(None)
        self._thread.join()
        try:
            if sync:
                if self._problem:
                    raise self._problem
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _drain(self) -> None:
        while (filled := self._full.get()) is not None:
            buffer, used = filled
            try:
                if self._problem is None:
                    self._write(memoryview(buffer)[:used])
            except OSError as problem:
                self._problem = problem
            self._free.put(buffer)

    def _write(self, view: memoryview) -> None:
        self.digest.update(view)
        if self._direct and len(view) % mmap.PAGESIZE:  # the end of the file
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)
            self._direct = False
        while view:
            view = view[os.write(self._descriptor, view) :]


def _open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor of a new file, and whether its writes pass by the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666), False  # a file system without direct writes, such as an older tmpfs


def _row_blocks(array: Array, itemsize: int) -> Iterator[Array]:
    if array.ndim < 2:
        yield array
        return
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def _largest_bits(block: Array) -> int:
    """Bits of the largest magnitude of a float block; magnitudes order as their bits do, infinities and nan last."""
    if block.dtype not in _FLOATS:
        return 0
    unsigned = block.view(f"u{block.itemsize}")
    sign = 1 << (8 * block.itemsize - 1)
    # Positive numbers lead as signed integers, negative ones as unsigned: two passes, no memory.
    return max(int(unsigned.view(f"i{block.itemsize}").max()), int(unsigned.max()) & (sign - 1))
