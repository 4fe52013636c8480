"""An all-reduce with a known sum in separate processes, which shows whether collectives hang or damage data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trtqwen.system.leftovers import workspace

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["nccl", "gloo"]
_SIZES = (1 << 10, 1 << 18, 1 << 22)  # values: small messages and large ones take different ways
_ROUNDS = 4
_WRONG = 3
_MODULUS = 251  # a prime: a shifted or repeated block shows


def cuda_version() -> str | None:
    """The CUDA that the installed PyTorch was built for; None for a build without."""
    import torch

    return torch.version.cuda


def all_reduce_problem(
    world_size: int, backend: Backend, timeout: float, environment: Mapping[str, str] | None = None
) -> str | None:
    """Run the all-reduce and return its problem, or None.

    Args:
        timeout: seconds for all of it.
        environment: variables for the ranks, in addition to this process's own.
    """
    with workspace("collective") as directory:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, backend, str(world_size), str(rank), str(directory)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
                if any(process.poll() for process in ranks):
                    break  # the others wait for it for nothing
                time.sleep(0.05)
            codes = [process.poll() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        errors = [process.communicate()[1] for process in ranks]
    if _WRONG in codes:
        return "wrong sums: data is damaged on the way between the cards"
    for rank, code in enumerate(codes):
        if code:
            lines = errors[rank].strip().splitlines() or [f"code {code}"]
            return f"rank {rank} failed: {lines[-1]}"
    return f"not finished after {timeout:g} s: the first collective hangs" if None in codes else None


def contribution(rank: int, size: int) -> Tensor:
    """Return a rank's input: whole numbers in float32, so that every order of addition gives the same sum."""
    import torch

    return (torch.arange(size) % _MODULUS + rank).float()


def is_sum(reduced: Tensor, world_size: int) -> bool:
    """Whether it is the sum over ranks 0 to world_size - 1."""
    import torch

    ranks = world_size * (world_size - 1) // 2
    expected = (torch.arange(len(reduced)) % _MODULUS * world_size + ranks).float()
    return torch.equal(reduced.cpu(), expected)


def main(backend: str, world_size: int, rank: int, directory: Path) -> int:
    """One rank."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = f"file://{directory / 'store'}"
    dist.init_process_group(
        backend, init_method=store, world_size=world_size, rank=rank, timeout=timedelta(minutes=5)
    )
    for size in _SIZES:
        for _ in range(_ROUNDS):
            values = contribution(rank, size).to(device)
            dist.all_reduce(values)
            if not is_sum(values, world_size):
                return _WRONG
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
