"""Upload of weights from a rank's file to the GPU: several threads copy through pinned buffers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtqwen.quantize.weight_only import Int8Layout, quantize
from trtqwen.safetensors_io.format import Array

_BUFFER = 32 << 20  # bytes of a pinned buffer
_THREADS = 4
_TORCH = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_AWAY_FROM_ZERO = 1 - 2**-21  # as in quantize.weight_only
_SMALL = 2.0**-100


class Uploader:
    """Copies arrays of a memory-mapped file to a device. One for each rank, while it starts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(_THREADS, "upload") if device.type == "cuda" else None
        self._free: list[tuple[Tensor, torch.cuda.Stream]] = []

    def __call__(self, *arrays: Array) -> Tensor:
        """The arrays on the device, joined along their first axis, in their own dtype."""
        shape = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
        target = torch.empty(shape, dtype=_TORCH[arrays[0].dtype.name], device=self._device)
        place = target.view(-1).view(torch.uint8)
        pieces = list(_pieces(arrays))
        if self._pool is None:
            for begin, piece in pieces:
                place[begin : begin + len(piece)] = torch.from_numpy(piece.copy())
        else:
            torch.cuda.current_stream(self._device).synchronize()  # the target's memory may still be in use
            list(self._pool.map(lambda item: self._copy(place, *item), pieces))
        return target

    def close(self) -> None:
        """Release the buffers."""
        if self._pool is not None:
            self._pool.shutdown()
        self._free.clear()

    def _copy(self, target: Tensor, begin: int, piece: npt.NDArray[np.uint8]) -> None:
        try:
            buffer, stream = self._free.pop()
        except IndexError:
            buffer = torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True)
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        buffer.numpy()[: len(piece)] = piece
        with torch.cuda.stream(stream):
            target[begin : begin + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
        stream.synchronize()
        self._free.append((buffer, stream))


def _pieces(arrays: tuple[Array, ...]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(offset in the whole, bytes) of pieces that fit a buffer."""
    offset = 0
    for array in arrays:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for begin in range(0, len(content), _BUFFER):
            yield offset + begin, content[begin : begin + _BUFFER]
        offset += len(content)


def from_layout(stored: Tensor, layout: Int8Layout) -> Tensor:
    """`quantize.weight_only.from_layout` on the device: int8 [out, in] of [in, out]."""
    inner, out = stored.shape
    words = stored.reshape(-1).view(torch.uint8)
    if layout == "sm80":
        words = words.view(out // 2, inner // 64, 2, 64).transpose(1, 2)
    columns = words.reshape(out, inner // 16, 8, 2).transpose(2, 3).reshape(out, inner)
    return (columns ^ 0x80).view(torch.int8)


def quantize_weights(weight: Tensor, original: tuple[Array, ...]) -> tuple[Tensor, Tensor]:
    """`quantize.weight_only.quantize` on the device: int8 [out, in], and float32 steps [out].

    Args:
        weight: [out, in].
        original: the same on the host, for rows with values too small to divide by.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    steps = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for begin in range(0, len(weight), 4096):
        rows = weight[begin : begin + 4096].float()
        largest = rows.abs().amax(dim=1)
        if bool(((largest > 0) & (largest < _SMALL)).any()):
            host = [quantize(array) for array in original]
            return (
                torch.from_numpy(np.concatenate([part[0] for part in host])).to(weight.device),
                torch.from_numpy(np.concatenate([part[1] for part in host])).to(weight.device),
            )
        step = largest * (1 / 128)
        divisors = torch.where(largest > 0, step * _AWAY_FROM_ZERO, 1.0)
        codes[begin : begin + 4096] = (rows / divisors[:, None]).round().clamp(max=127).to(torch.int8)
        steps[begin : begin + 4096] = step
    return codes, steps


def to_float(array: Array) -> float:
    """The value of a tensor of one element."""
    values: npt.NDArray[Any] = np.asarray(array, np.float32).reshape(-1)
    return float(values[0])
