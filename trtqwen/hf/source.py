"""The tensors of a Hugging Face model directory, single-file or sharded, read lazily."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from trtqwen.artifact.digest import digest_file
from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.chat_template import template_files
from trtqwen.hf.config import HfConfig, load_config, stretched
from trtqwen.hf.names import EMBEDDING, LM_HEAD, check_names, check_specs, expected_tensors, stored_dtype
from trtqwen.hf.tokenizer_files import TOKENIZER_FILES
from trtqwen.hf.weights import INDEX, open_weights, same_tensor
from trtqwen.safetensors_io.format import Array, TensorSpec
from trtqwen.safetensors_io.reader import SafetensorsReader


class HfModel:
    """An opened model directory. Opening reads headers only; every tensor is there and has the shape of the config.

    Args:
        yarn_factor: stretch the context by YaRN, which config.json does not ask for.

    Attributes:
        findings: findings about the directory: defaults that apply, and tensors that are not read.

    Raises:
        SourceError: if config or weights are missing, damaged, contradict each other or are of another kind of model.
    """

    def __init__(self, directory: Path, yarn_factor: float | None = None) -> None:
        self.directory = directory
        config = load_config(directory)
        weights = open_weights(directory)
        self._readers, self._owner = weights.readers, weights.owner
        ignored = check_names(directory, self._owner.keys(), config)
        self._alias = {EMBEDDING: LM_HEAD} if EMBEDDING not in self._owner else {}
        specs = {name: self.spec(name) for name in self._owner}
        check_specs(directory, specs, config)
        self._examined: dict[str, tuple[str, float]] = {}
        config, said = _with_dtype(directory, config, specs)
        _check_tied(directory, config, self._owner)
        self.findings: tuple[Diagnostic, ...] = (*config.findings, *weights.findings, *ignored, *said)
        self.config: HfConfig = stretched(config, yarn_factor) if yarn_factor else config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.tie_word_embeddings

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __contains__(self, name: str) -> bool:
        return self._alias.get(name, name) in self._owner

    def spec(self, name: str) -> TensorSpec:
        return self._reader(name).spec(self._alias.get(name, name))

    def tensor(self, name: str) -> Array:
        """The tensor, read-only, in the file's own dtype."""
        return self._reader(name).tensor(self._alias.get(name, name))

    def rows(self, name: str, indices: Sequence[int]) -> Array:
        """A copy of some rows of a tensor; reads nothing else."""
        return self._reader(name).rows(self._alias.get(name, name), indices)

    def map_files(self, mapped: bool) -> None:
        """Set whether tensors are views of the mapped files: safe while no other process can truncate them."""
        for reader in self._readers.values():
            reader.mapped = mapped

    def examine(self, name: str) -> float:
        """Read the tensor, take its digest, and return its largest magnitude.

        Raises:
            SourceError: if it holds values that are not finite.
        """
        if name not in self._examined:
            digest, largest = self._reader(name).examine(self._alias.get(name, name))
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
        """Release the tensor's memory after its use."""
        self._reader(name).release(self._alias.get(name, name))

    def digests(self) -> dict[str, str]:
        """Content digest of every file that decides a conversion, by file name; reads what was not read yet."""
        small = {
            str(path.relative_to(self.directory)): digest_file(path)
            for path in [self.directory / CONFIG, *self.tokenizer_files]
        }
        return small | {
            file: reader.file_digest(self._tensor_digests(reader)) for file, reader in self._readers.items()
        }

    def _tensor_digests(self, reader: SafetensorsReader) -> dict[str, str]:
        digests, used = {}, expected_tensors(self.config)
        for name in reader:
            if self._owner[name] is not reader or name not in used:
                digests[name] = reader.examine(name)[0]
                continue
            self.examine(name)
            digests[name] = self._examined[name][0]
        return digests

    @property
    def files(self) -> list[Path]:
        """The files with the weights, and their index if there is one."""
        index = self.directory / INDEX
        return [*(reader.path for reader in self._readers.values()), *([index] if index.is_file() else [])]

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings, as far as the directory has them."""
        files = [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]
        return files + template_files(self.directory)

    @property
    def num_values(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(self.spec(name).shape) for name in self._owner)

    def _reader(self, name: str) -> SafetensorsReader:
        return self._owner[self._alias.get(name, name)]


def _with_dtype(directory: Path, config: HfConfig, specs: dict[str, TensorSpec]) -> tuple[HfConfig, list[Diagnostic]]:
    """The config with the dtype of the weights where it names none, as transformers' `auto` takes it."""
    stored = stored_dtype(specs)
    if config.torch_dtype is not None or stored is None:
        return config, []
    name = "float32" if stored.name == "float64" else stored.name
    finding = Diagnostic(
        f"{directory / CONFIG}: has no dtype: {name} is taken from the weights (NVIDIA's converter would take "
        "float16)",
        "",
        "note",
        "config",
    )
    return config.model_copy(update={"torch_dtype": name}), [finding]


def _check_tied(directory: Path, config: HfConfig, owner: dict[str, SafetensorsReader]) -> None:
    """Refuse a head together with an embedding that it is said to be tied to, unless they are equal."""
    if not config.tie_word_embeddings or LM_HEAD not in owner or EMBEDDING not in owner:
        return
    if not same_tensor(owner[EMBEDDING], EMBEDDING, owner[LM_HEAD], LM_HEAD):
        raise SourceError(
            f"{directory}: tie_word_embeddings is true, but {LM_HEAD} differs from the embedding; transformers 4 "
            "drops it, transformers 5 keeps both",
            "set tie_word_embeddings to false if the head was trained (as LoRA on both does), or remove the tensor",
        )
