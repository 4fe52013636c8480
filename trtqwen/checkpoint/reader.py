"""Reading a TensorRT-LLM checkpoint rank by rank, checked against what its config.json promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trtqwen.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtqwen.errors import CheckpointError
from trtqwen.safetensors_io import Array, SafetensorsReader


class CheckpointReader:
    """The rank files of a checkpoint directory.

    Raises:
        CheckpointError: if config.json or a rank file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: CheckpointConfig = read_checkpoint_config(directory)

    def rank(self, rank: int) -> Iterator[tuple[str, Array]]:
        """Names and read-only tensors of one rank, in the order of the file."""
        reader = SafetensorsReader(self.directory / f"rank{rank}.safetensors", CheckpointError)
        for name in reader:
            yield name, reader.tensor(name)
