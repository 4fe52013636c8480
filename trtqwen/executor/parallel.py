"""Communication for tensor and pipeline parallelism, over torch.distributed or for a single rank."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.executor.control import ControlChannel

# An idle server leaves the other ranks waiting for the next step as long as no request comes.
_FOREVER = timedelta(days=365)
# gloo's all-reduce goes round the ring twice; for a few tokens one exchange of everything takes a third of the time.
_SMALL = 1 << 16


class Communicator(Protocol):
    """The communication of the model and the step loop with other ranks.

    Attributes:
        rank, size: place among all ranks.
        tp_rank, tp_size: place among the ranks that share this rank's layers.
        stage: pipeline stage.
        is_first, is_last: whether the stage begins or ends the pipeline.
    """

    rank: int
    size: int
    tp_rank: int
    tp_size: int
    stage: int
    is_first: bool
    is_last: bool

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over the stage's ranks; may reuse its memory."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of the stage's ranks joined along the last axis."""
        ...

    def gather(self, tensor: Tensor) -> Tensor | None:
        """The same on the stage's first rank alone; None elsewhere."""
        ...

    def send(self, tensor: Tensor) -> None:
        """Send a tensor to the next stage."""
        ...

    def receive(self, tensor: Tensor) -> Tensor:
        """Receive a tensor from the previous stage."""
        ...

    def to_rank_0(self, tensor: Tensor | None, room: Tensor) -> Tensor | None:
        """Return the tensor of the last stage's first rank on rank 0; None on the other ranks.

        Args:
            room: a tensor of its shape, to receive it into.
        """
        ...

    def broadcast(self, data: bytes | None) -> bytes:
        """Send rank 0's bytes to every rank, through the host."""
        ...

    def least(self, value: int) -> int:
        """Return the smallest value of all ranks."""
        ...

    def share_tokens(self, tokens: Tensor) -> None:
        """Copy rank 0's sampled tokens to every rank's device, in place. Overlapped steps read them there."""
        ...


class SingleRank:
    """The communicator of a model that runs on one rank."""

    rank = tp_rank = stage = 0
    size = tp_size = 1
    is_first = is_last = True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def send(self, tensor: Tensor) -> None:
        raise AssertionError("there is no next stage")

    def receive(self, tensor: Tensor) -> Tensor:
        raise AssertionError("there is no stage before")

    def to_rank_0(self, tensor: Tensor | None, room: Tensor) -> Tensor | None:
        return tensor

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data

    def least(self, value: int) -> int:
        return value

    def share_tokens(self, tokens: Tensor) -> None:
        """Do nothing: there is no other rank."""


class ProcessGroup:
    """One process for each rank of one host: NCCL between GPUs, gloo on loopback between CPUs.

    Args:
        rendezvous: file with which the ranks find each other; steps use a socket next to it.
    """

    def __init__(self, rank: int, mapping: RankMapping, rendezvous: Path, device: torch.device) -> None:
        self.rank = rank
        self.size = mapping.world_size
        self._device = device
        self._cuda = device.type == "cuda"
        self.tp_size = mapping.tp_size
        self.tp_rank = mapping.tp_rank(rank)
        self.stage = rank // mapping.tp_size
        self.is_first = self.stage == 0
        self.is_last = self.stage == mapping.pp_size - 1
        self._control = ControlChannel(rank, self.size, rendezvous.with_name("control"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self._cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if self._cuda else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=self.size,
            timeout=_FOREVER,
            device_id=device if self._cuda else None,
        )
        groups = [dist.new_group(list(mapping.stage_ranks(stage))) for stage in range(mapping.pp_size)]
        self._group = groups[self.stage]
        self._leader = mapping.stage_ranks(self.stage)[0]
        self._last_leader = mapping.stage_ranks(mapping.pp_size - 1)[0]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.tp_size == 1:
            return tensor
        if self._cuda or tensor.numel() > _SMALL:
            dist.all_reduce(tensor, group=self._group)
            return tensor
        return torch.stack(self._exchange(tensor)).sum(dim=0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)

    def gather(self, tensor: Tensor) -> Tensor | None:
        tensor = tensor.contiguous()
        leads = self.rank == self._leader
        parts = [torch.empty_like(tensor) for _ in range(self.tp_size)] if leads else None
        dist.gather(tensor, parts, dst=self._leader, group=self._group)
        return torch.cat(parts, dim=-1) if parts is not None else None

    def send(self, tensor: Tensor) -> None:
        dist.send(tensor.contiguous(), self.rank + self.tp_size)

    def receive(self, tensor: Tensor) -> Tensor:
        dist.recv(tensor, self.rank - self.tp_size)
        return tensor

    def to_rank_0(self, tensor: Tensor | None, room: Tensor) -> Tensor | None:
        if self._last_leader == 0:
            return tensor
        if tensor is not None:
            dist.send(tensor.contiguous(), 0)
        if self.rank != 0:
            return None
        dist.recv(room, self._last_leader)
        return room

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.tp_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return parts

    def broadcast(self, data: bytes | None) -> bytes:
        if data is None:
            return self._control.receive()
        self._control.send(data)
        return data

    def least(self, value: int) -> int:
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def share_tokens(self, tokens: Tensor) -> None:
        if self._cuda:
            dist.broadcast(tokens, src=0)
