"""One rank that exchanges tensors and bytes with the others: `exchanges RANK SIZE STAGES DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.executor.parallel import ProcessGroup


def main() -> None:
    """Check every collective."""
    rank, size, stages = (int(word) for word in sys.argv[1:4])
    group = ProcessGroup(rank, RankMapping(size, stages), Path(sys.argv[4]), torch.device("cpu"))
    place = rank % size
    for count in (5, 70_000):  # one exchange, and gloo's own ring
        part = torch.arange(count).float().view(1, -1) * (place + 1)
        total = group.all_reduce(part)
        assert torch.equal(total, torch.arange(count).float().view(1, -1) * (size * (size + 1) // 2))
    expected = [float(r) for r in range(size) for _ in range(3)]
    assert group.all_gather(torch.full((2, 3), float(place)))[1].tolist() == expected
    joined = group.gather(torch.full((2, 3), float(place)))
    assert (joined is None) == (place > 0)
    assert joined is None or joined[1].tolist() == expected
    hidden = torch.full((4, 2), float(rank))
    if not group.is_first:
        assert group.receive(torch.empty(4, 2))[0, 0] == rank - size
    if not group.is_last:
        group.send(hidden)
    result = torch.full((1, 5), 7.0) if group.is_last and place == 0 else None
    brought = group.to_rank_0(result, torch.empty(1, 5))
    assert rank > 0 or (brought is not None and brought.tolist() == [[7.0] * 5])
    for length in (0, 1, 4096, 4097, 100_000):
        data = bytes(i % 251 for i in range(length))
        assert group.broadcast(data if rank == 0 else None) == data
    print("fine", flush=True)
