"""Reading a checkpoint's rank files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trtqwen.artifact.names import rank_weights
from trtqwen.diagnostics import CheckpointError
from trtqwen.safetensors_io.format import Array
from trtqwen.safetensors_io.reader import SafetensorsReader


def read_rank(directory: Path, rank: int) -> Iterator[tuple[str, Array]]:
    """Names and read-only tensors of one rank, in the order of its file.

    Raises:
        CheckpointError: if the rank file is missing or damaged.
    """
    reader = SafetensorsReader(directory / rank_weights(rank), CheckpointError)
    for name in reader:
        yield name, reader.tensor(name)
