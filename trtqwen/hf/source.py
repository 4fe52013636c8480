"""The tensors of a Hugging Face model directory, single-file or sharded, read lazily from memory-mapped files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from trtqwen.artifact import digest_file
from trtqwen.diagnostics import SourceError
from trtqwen.hf.config import HfConfig, load_config, stretched
from trtqwen.layout import CONFIG
from trtqwen.safetensors_io import Array, SafetensorsReader, TensorSpec

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class HfModel:
    """An opened model directory. Opening reads headers only; every shard is checked for completeness.

    Args:
        yarn_factor: stretch the context by YaRN, which config.json does not ask for.

    Raises:
        SourceError: if the config or a shard is missing, cut short or damaged.
    """

    def __init__(self, directory: Path, yarn_factor: float | None = None) -> None:
        self.directory = directory
        config = load_config(directory)
        self.config: HfConfig = stretched(config, yarn_factor) if yarn_factor else config
        self._files = _weight_files(directory)
        self._readers = {path.name: SafetensorsReader(path, SourceError) for path in self._files}
        self._owner = {name: reader for reader in self._readers.values() for name in reader}
        self._examined: dict[str, tuple[str, float]] = {}
        _check_index(directory, self._owner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def spec(self, name: str) -> TensorSpec:
        return self._reader(name).spec(name)

    def tensor(self, name: str) -> Array:
        """A read-only view of the tensor, in the file's own dtype."""
        return self._reader(name).tensor(name)

    def examine(self, name: str) -> float:
        """Read the tensor, take its digest, and return its largest magnitude.

        Raises:
            SourceError: if it holds values that are not finite.
        """
        if name not in self._examined:
            digest, largest = self._reader(name).examine(name)
            if not math.isfinite(largest):
                count = self.count_beyond(name, math.inf)
                raise SourceError(
                    f"{self.directory}: tensor {name!r} holds {count} values that are not finite", "download it again"
                )
            self._examined[name] = digest, largest
        return self._examined[name][1]

    def count_beyond(self, name: str, limit: float) -> int:
        """How many values of a tensor are nan or have a magnitude of at least `limit`."""
        rows = np.atleast_2d(self.tensor(name))
        return sum(int((~(np.abs(row.astype(np.float32)) < limit)).sum()) for row in rows)

    def finish(self, name: str) -> None:
        """Give the tensor's memory back: call it when the tensor was used."""
        self._reader(name).release(name)

    def digests(self) -> dict[str, str]:
        """Content digest of every file that decides a conversion, by file name; reads what was not read yet."""
        for name in self._owner:
            if name not in self._examined:
                self.examine(name)
                self.finish(name)
        digests = {name: digest for name, (digest, _) in self._examined.items()}
        small = {path.name: digest_file(path) for path in [self.directory / CONFIG, *self.tokenizer_files]}
        return small | {name: reader.file_digest(digests) for name, reader in self._readers.items()}

    @property
    def files(self) -> list[Path]:
        """The files with the weights, and their index if there is one."""
        index = self.directory / INDEX
        return [*self._files, *([index] if index.is_file() else [])]

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings, as far as the directory has them."""
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]

    @property
    def num_values(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(self.spec(name).shape) for name in self)

    def _reader(self, name: str) -> SafetensorsReader:
        try:
            return self._owner[name]
        except KeyError:
            raise SourceError(
                f"{self.directory}: tensor {name!r} is missing", "the model is incomplete, download it again"
            ) from None


def _weight_files(directory: Path) -> list[Path]:
    """All shards of the index, or every safetensors file of a directory without one (as TensorRT-LLM reads it)."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise SourceError(f"{index}: is not a safetensors index", "download the file again") from None
        for name in names:
            if not (directory / name).is_file():
                raise SourceError(f"{directory / name}: this shard of the index is missing", "download it again")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SourceError(
            f"{directory}: has no *.safetensors", "only safetensors are read (convert .bin files first)"
        )
    return files


def _check_index(directory: Path, owner: dict[str, SafetensorsReader]) -> None:
    index = directory / INDEX
    if not index.is_file():
        return
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if name not in owner or owner[name].path.name != file:
            raise SourceError(f"{index}: places tensor {name!r} in {file}, which does not hold it", "download again")
