"""Reading and streaming the safetensors format without holding more than the tensors in work.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes back to back, row major, little endian. The
upstream library reads files but has no streaming writer, so both ends live here, side by side.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from trtqwen.errors import InputError

Array = npt.NDArray[Any]

_BLOCK_BYTES = 8 << 20
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
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
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
    """A memory-mapped safetensors file; tensors are read-only views, nothing is loaded ahead.

    Raises:
        error: (the class given; `InputError` unless told) if the file is missing, cut short, or not safetensors.
    """

    def __init__(self, path: Path, error: type[InputError] = InputError) -> None:
        self.path = path
        self._error = error
        try:
            with path.open("rb") as file:
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
        """The tensor as a read-only array over the mapped file (bfloat16 as `ml_dtypes.bfloat16`)."""
        entry = self._entry(name)
        start = self._data_start + entry.begin
        count = math.prod(entry.spec.shape)
        return np.frombuffer(self._map, entry.spec.dtype, count, start).reshape(entry.spec.shape)

    def tensor_digest(self, name: str) -> str:
        """XXH3-128 of the tensor's bytes, as 32 hex digits."""
        return xxhash.xxh3_128_hexdigest(self.tensor(name).reshape(-1).view(np.uint8).data)

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

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._error(f"{self.path}: has no tensor {name!r}; the file does not fit its index") from None


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
    dtype = _NUMPY_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"holds tensor {name!r} of dtype {entry['dtype']}, which trtqwen does not know")
    shape = tuple(int(extent) for extent in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    spec = TensorSpec(shape, dtype)
    if min(shape, default=0) < 0 or end - begin != spec.nbytes:
        raise ValueError(f"is damaged (tensor {name!r}: {end - begin} bytes do not hold shape {list(shape)})")
    return _Entry(spec, begin, end)


class SafetensorsWriter:
    """Writes a safetensors file front to back: the header first, then each tensor in the order of the plan.

    Holds one block of a tensor at a time (`_BLOCK_BYTES`, or one row where that is larger). Use as a context
    manager: leaving it normally checks that the plan was fulfilled and syncs the file.

    Args:
        path: file to create.
        plan: every tensor of the file, in the order of its bytes.
    """

    def __init__(self, path: Path, plan: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self._pending = list(plan.items())
        self._pending.reverse()
        self._digest = xxhash.xxh3_128()
        header: dict[str, Any] = {}
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
        self._file = path.open("wb", buffering=0)
        self._append(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, parts: Sequence[Array], via: np.dtype[Any] | None = None) -> int:
        """Append the next tensor, given as parts to be joined along the first axis, cast to the planned dtype.

        Args:
            via: round to this dtype first.

        Returns:
            The bytes written.

        Raises:
            ValueError: if `name` is not the next tensor of the plan or the parts do not fill its shape.
        """
        expected, spec = self._pending[-1] if self._pending else ("the end of the file", None)
        if spec is None or name != expected:
            raise ValueError(f"{self.path}: {name!r} written where {expected!r} is due")
        rows = sum(part.shape[0] for part in parts) if spec.shape else 1
        if rows != (spec.shape[0] if spec.shape else 1) or any(part.shape[1:] != spec.shape[1:] for part in parts):
            raise ValueError(f"{self.path}: {name!r} has parts {[p.shape for p in parts]}, planned {spec.shape}")
        for part in parts:
            for block in _row_blocks(part, spec.dtype.itemsize):
                block = block if via is None else block.astype(via, copy=False)
                self._append(np.ascontiguousarray(block, dtype=spec.dtype).reshape(-1).view(np.uint8).data)
        self._pending.pop()
        return spec.nbytes

    def digest(self) -> str:
        """XXH3-128 of what was written so far, as 32 hex digits."""
        return self._digest.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._pending:
                    raise ValueError(f"{self.path}: {len(self._pending)} planned tensors were never written")
                os.fsync(self._file.fileno())


def _row_blocks(array: Array, itemsize: int) -> Iterator[Array]:
    if array.ndim < 2:
        yield array
        return
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]
