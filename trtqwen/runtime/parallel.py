"""Tensor parallelism: the few collectives a step needs, over torch.distributed or for a single rank."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# An idle server leaves the other ranks waiting for the next step as long as no request comes.
_FOREVER = timedelta(days=365)
# gloo's all-reduce goes round the ring twice; for a few tokens one exchange of everything takes a third of the time.
_SMALL = 1 << 16
_HEAD = 4096


class Communicator(Protocol):
    """What the model and the step loop ask of the other ranks."""

    rank: int
    tp_size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor; may reuse its memory."""
        ...

    def gather(self, tensor: Tensor) -> Tensor | None:
        """All ranks' tensors joined along the last axis on rank 0; None elsewhere."""
        ...

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank."""
        ...


class SingleRank:
    """The communicator of a model that runs on one rank."""

    rank = 0
    tp_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data


class ProcessGroup:
    """One process a rank, joined through a file that all of them can reach. gloo, on loopback."""

    def __init__(self, rank: int, tp_size: int, rendezvous: Path) -> None:
        self.rank = rank
        self.tp_size = tp_size
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=tp_size, timeout=_FOREVER
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if tensor.numel() > _SMALL:
            dist.all_reduce(tensor)
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.tp_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts).sum(dim=0)

    def gather(self, tensor: Tensor) -> Tensor | None:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.tp_size)] if self.rank == 0 else None
        dist.gather(tensor, parts)
        return torch.cat(parts, dim=-1) if parts is not None else None

    def broadcast(self, data: bytes | None) -> bytes:
        """One message if the data is short: its length and its beginning travel together."""
        head = torch.zeros(_HEAD + 8, dtype=torch.uint8)
        if data is not None:
            first = len(data).to_bytes(8, "little") + data[:_HEAD]
            head[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        dist.broadcast(head, src=0)
        raw = head.numpy().tobytes()
        size = int.from_bytes(raw[:8], "little")
        if size <= _HEAD:
            return raw[8 : 8 + size]
        rest = torch.zeros(size - _HEAD, dtype=torch.uint8)
        if data is not None:
            rest = torch.frombuffer(bytearray(data[_HEAD:]), dtype=torch.uint8)
        dist.broadcast(rest, src=0)
        return raw[8:] + rest.numpy().tobytes()
