"""The safetensors format: a header that names each tensor's dtype, shape and place.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes back to back, row major, little endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BLOCK_BYTES = 1 << 19  # read or cast at a time: stays in a core's cache
_HEADER_LIMIT = 100_000_000  # the upstream library refuses larger headers
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
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
_OPAQUE = np.dtype("V1")  # of a dtype that numpy does not have: the tensor is a row of bytes
_FORMAT_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor, as a header states them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor's spec, and where its bytes begin and end in the data section."""

    spec: TensorSpec
    begin: int
    end: int


def read_header(file: IO[bytes], size: int) -> tuple[dict[str, Entry], int, bytes]:
    """Read the header of a file of `size` bytes.

    Returns:
        The tensors in the order of their bytes, where the data section starts, and the header's bytes.

    Raises:
        ValueError: if the file is cut short, damaged or of another format.
    """
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


def _parse_entry(name: str, entry: dict[str, Any]) -> Entry:
    dtype = NUMPY_DTYPES.get(entry["dtype"], _OPAQUE)
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"]) if dtype is not _OPAQUE else (end - begin,)
    spec = TensorSpec(shape, dtype)
    if min(shape, default=0) < 0 or end - begin != spec.nbytes:
        raise ValueError(f"is damaged (tensor {name!r}: {end - begin} bytes do not hold shape {list(shape)})")
    return Entry(spec, begin, end)


def header_bytes(plan: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file with these tensors back to back, its length in front."""
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
    return len(raw).to_bytes(8, "little") + raw
