"""Communication of ranks on several GPUs: NCCL, and sums of few tokens through mapped GPU memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.executor.cuda.kernels.all_reduce import PROGRAMS, all_reduce, can_reduce
from trtqwen.executor.parallel import ProcessGroup

_MEASURED_ROWS = (1, 8, 64, 256, 512)
_REPEATS = 20
_ROUNDS = 5


class CudaGroup(ProcessGroup):
    """One process for each card of one host. At its start it measures the fastest sum for each number of tokens.

    Args:
        hidden_size: elements of a token.
        dtype: of what is summed.
    """

    def __init__(
        self,
        rank: int,
        mapping: RankMapping,
        rendezvous: Path,
        device: torch.device,
        *,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(rank, mapping, rendezvous, device)
        self._limits: list[tuple[int, Callable[[Tensor], None]]] = []
        if can_reduce(self.tp_size) and self._maps_peers():
            room = _MEASURED_ROWS[-1] * hidden_size
            memory = _MappedMemory(self._group, self.tp_rank, room, dtype, device)
            self._measure(memory, hidden_size, dtype)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.tp_size > 1:
            self._way(tensor)(tensor)
        return tensor

    def _way(self, tensor: Tensor) -> Callable[[Tensor], None]:
        elements = tensor.numel()
        return next((way for most, way in self._limits if elements <= most), self._nccl)

    def _nccl(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)

    def _maps_peers(self) -> bool:
        """Return whether every GPU of the stage can access the memory of every other one."""
        own = self._device.index
        reaches = os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0") and all(
            torch.cuda.can_device_access_peer(own, other)
            for other in range(own - self.tp_rank, own - self.tp_rank + self.tp_size)
            if other != own
        )
        return bool(self.least(int(reaches)))

    def _measure(self, memory: _MappedMemory, hidden_size: int, dtype: torch.dtype) -> None:
        ways = {"NCCL": self._nccl, "one-shot": memory.one_shot, "two-shot": memory.two_shot}
        said = []
        for rows in _MEASURED_ROWS:
            values = torch.zeros(rows * hidden_size, dtype=dtype, device=self._device)
            times = torch.tensor([_microseconds(way, values) for way in ways.values()], device=self._device)
            dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self._group)  # all ranks choose alike
            name = list(ways)[int(times.argmin())]
            self._limits.append((rows * hidden_size, ways[name]))
            said.append(f"{rows} {name} {float(times.min()):.0f} us (NCCL {float(times[0]):.0f})")
        if self.tp_rank == 0:
            print(f"rank {self.rank} sums tokens by: {', '.join(said)}", file=sys.stderr, flush=True)


class _MappedMemory:
    """A buffer of each GPU, mapped by the other GPUs."""

    def __init__(
        self, group: dist.ProcessGroup, rank: int, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        world = dist.get_world_size(group)
        self._rank, self._room = rank, room
        self._buffer = symmetric_memory.empty(4 * room, dtype=dtype, device=device)
        self._signals = symmetric_memory.empty(PROGRAMS * world, dtype=torch.int32, device=device)
        self._signals.zero_()
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        self._places = [
            torch.tensor(
                [handle.get_buffer(peer, tensor.shape, tensor.dtype).data_ptr() for peer in range(world)],
                dtype=torch.int64,
                device=device,
            )
            for tensor in (self._buffer, self._signals)
            for handle in [symmetric_memory.rendezvous(tensor, group)]
        ]
        dist.barrier(group)

    def one_shot(self, tensor: Tensor) -> None:
        self._reduce(tensor, two_shot=False)

    def two_shot(self, tensor: Tensor) -> None:
        self._reduce(tensor, two_shot=True)

    def _reduce(self, tensor: Tensor, *, two_shot: bool) -> None:
        buffers, signals = self._places
        all_reduce(tensor, buffers, signals, self._calls, room=self._room, rank=self._rank, two_shot=two_shot)


def _microseconds(way: Callable[[Tensor], None], values: Tensor) -> float:
    """Return the time of one sum inside a CUDA graph."""
    for _ in range(3):
        way(values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            way(values)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    best = float("inf")
    for _ in range(_ROUNDS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return 1000 * best / _REPEATS
