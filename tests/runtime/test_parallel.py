"""The collectives between real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
from trtqwen.runtime.parallel import ProcessGroup

rank, size = int(sys.argv[1]), int(sys.argv[2])
group = ProcessGroup(rank, size, Path(sys.argv[3]))
for count in (5, 70_000):  # one exchange, and gloo's own ring
    part = torch.arange(count).float().view(1, -1) * (rank + 1)
    total = group.all_reduce(part)
    assert torch.equal(total, torch.arange(count).float().view(1, -1) * (size * (size + 1) // 2))
joined = group.gather(torch.full((2, 3), float(rank)))
assert (joined is None) == (rank > 0)
if joined is not None:
    assert joined[1].tolist() == [float(r) for r in range(size) for _ in range(3)]
for length in (0, 1, 4096, 4097, 100_000):
    data = bytes(i % 251 for i in range(length))
    assert group.broadcast(data if rank == 0 else None) == data
print("fine", flush=True)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(tmp_path: Path, size: int) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(size), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    assert [rank.communicate(timeout=60)[0].splitlines()[-1] for rank in ranks] == ["fine"] * size
