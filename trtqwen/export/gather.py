"""Whole tensors of a TensorRT-LLM checkpoint, gathered from the files of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtqwen.artifact.names import rank_weights
from trtqwen.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtqwen.checkpoint.sharding import Split
from trtqwen.diagnostics import CheckpointError
from trtqwen.quantize.weight_only import Int8Layout, from_layout, quantize
from trtqwen.safetensors_io.format import Array
from trtqwen.safetensors_io.reader import SafetensorsReader

EMBEDDING = "transformer.vocab_embedding.weight"
LM_HEAD = "lm_head.weight"
NORM = "transformer.ln_f.weight"
_LAYOUTS: tuple[Int8Layout, ...] = ("sm80", "sm90")


@dataclass(frozen=True)
class Scales:
    """The scales of a SmoothQuant matrix, float32.

    Attributes:
        weight: what a code stands for, by output channel, [out]; static activation scales are multiplied in.
        smoother: divides the input, [in]; None where a norm has done so.
        input: what a code of the input stands for; None where each token has its own.
    """

    weight: Array
    smoother: Array | None
    input: float | None


class Checkpoint:
    """A checkpoint of any mapping and precision. Tensors are read on demand.

    Raises:
        CheckpointError: if config.json or a rank file is missing or damaged, or the precision is not known.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: CheckpointConfig = read_checkpoint_config(directory)
        self._mapping = self.config.rank_mapping
        self._readers = [
            SafetensorsReader(directory / rank_weights(rank), CheckpointError)
            for rank in range(self._mapping.world_size)
        ]
        self.algo = self.config.quantization.quant_algo or ""
        if self.algo not in ("", "W8A16") and not self.smooth:
            raise CheckpointError(
                f"{directory}: quantization.quant_algo {self.algo} has no export", "export one of W8A16 or W8A8_SQ"
            )
        self._int8_layout: Int8Layout | None = None

    @property
    def smooth(self) -> bool:
        """Whether the matrices are SmoothQuant's."""
        return self.algo.startswith("W8A8_SQ_") and self.algo.endswith("_PLUGIN")

    @property
    def static(self) -> bool:
        """Whether SmoothQuant's activations have calibrated scales."""
        return self.smooth and not self.algo.endswith("PER_TOKEN_PLUGIN")

    def embedding(self) -> Array:
        """[vocab_size, hidden]."""
        parts = [self._read(rank, EMBEDDING) for rank in self._mapping.stage_ranks(0)]
        if not self.config.use_parallel_embedding:
            return parts[0]
        if self.config.embedding_sharding_dim == 1:
            return np.concatenate(parts, axis=1)
        return np.concatenate(parts)[: self.config.vocab_size]

    def lm_head(self) -> Array:
        """[vocab_size, hidden]."""
        return np.concatenate([self._read(rank, LM_HEAD) for rank in self._last])[: self.config.vocab_size]

    def norm(self, layer: int | None, name: str = NORM) -> Array:
        """The gains of a norm, [hidden]: of a layer, or the last one."""
        if layer is None:
            return self._read(self._last[0], NORM)
        prefix, ranks = self._place(layer)
        return self._read(ranks[0], f"{prefix}.{name}.weight")

    def floats(self, layer: int, name: str, split: Split) -> list[Array]:
        """The matrix of a float layer, [out, in]; three of them for qkv."""
        full = f"{self._place(layer)[0]}.{name}.weight"
        return self._merge([self._read(rank, full) for rank in self._ranks(layer)], split)

    def biases(self, layer: int) -> list[Array]:
        """The biases of q, k and v, each [out]."""
        name = f"{self._place(layer)[0]}.attention.qkv.bias"
        return self._merge([self._read(rank, name) for rank in self._ranks(layer)], Split.QKV)

    def weight_only(self, layer: int, name: str, split: Split) -> list[tuple[Array, Array]]:
        """INT8 codes [out, in] and what a code stands for, [out, parts]; three pairs for qkv.

        A row-parallel matrix has as many parts as ranks: each quantized its own columns. Padding is cut off.
        """
        full = f"{self._place(layer)[0]}.{name}"
        codes, steps = [], []
        for rank in self._ranks(layer):
            stored = self._read(rank, f"{full}.weight")
            if stored.dtype == np.int8:
                codes.append(from_layout(stored, self._layout(stored, f"{full}.weight")))
                steps.append(self._read(rank, f"{full}.per_channel_scale")[:, None])
            else:  # plain: TensorRT-LLM quantizes when it builds, each rank its own part
                part, step = quantize(stored)
                codes.append(part)
                steps.append(step.astype(stored.dtype)[:, None])
        merged = self._merge(codes, split)
        factors = [np.concatenate(steps, axis=1)] if split is Split.ROW else self._merge(steps, split)
        rows, columns = merged[0].shape
        if name in ("mlp.fc", "mlp.gate"):
            rows = self.config.intermediate_size
        if name == "mlp.proj":
            columns = self.config.intermediate_size
        if split is Split.QKV:
            return list(zip(merged, factors, strict=True))
        return [(merged[0][:rows, :columns], factors[0][:rows])]

    def smoothquant(self, layer: int, name: str, split: Split, to_int: str) -> list[tuple[Array, Scales]]:
        """INT8 codes [out, in] and scales; three pairs for qkv.

        Args:
            to_int: name, within the layer, of the tensor that static activations are multiplied with.
        """
        prefix, ranks = self._place(layer)
        full = f"{prefix}.{name}"
        codes = self._merge([self._read(rank, f"{full}.weight") for rank in ranks], split)
        factor, step = 1.0, None
        if self.static:
            to_codes = float(self._read(ranks[0], f"{prefix}.{to_int}").reshape(-1)[0])
            # Output = codes(input * to_int) * codes(weight) * act_scale * per_channel_scale.
            factor, step = float(self._read(ranks[0], f"{full}.act_scale").reshape(-1)[0]) * to_codes, 1 / to_codes
        parts = [self._read(rank, f"{full}.per_channel_scale").reshape(-1) for rank in ranks]
        if split is Split.ROW or parts[0].size == 1:
            scales = [np.broadcast_to(parts[0], (matrix.shape[0],)) for matrix in codes]
        else:
            scales = self._merge(parts, split)
        smoother = None
        if f"{full}.smoother" in self._readers[ranks[0]]:
            smoother = np.concatenate([self._read(rank, f"{full}.smoother").reshape(-1) for rank in ranks])
        return [
            (matrix, Scales((scale * np.float32(factor)).astype(np.float32), smoother, step))
            for matrix, scale in zip(codes, scales, strict=True)
        ]

    def tied(self) -> bool:
        """Whether lm_head is the embedding."""
        return self._equal(self.embedding(), self.lm_head())

    def release(self, layer: int) -> None:
        """Release the memory of a layer's tensors."""
        prefix, ranks = self._place(layer)
        for rank in ranks:
            for name in self._readers[rank]:
                if name.startswith(f"{prefix}."):
                    self._readers[rank].release(name)

    @staticmethod
    def _equal(one: Array, other: Array) -> bool:
        return one.shape == other.shape and all(
            np.array_equal(one[start : start + 4096], other[start : start + 4096])
            for start in range(0, len(one), 4096)
        )

    @property
    def _last(self) -> range:
        return self._mapping.stage_ranks(self._mapping.pp_size - 1)

    def _place(self, layer: int) -> tuple[str, range]:
        """The prefix of a layer's tensors in the files of its stage, and the ranks of the stage."""
        for stage in range(self._mapping.pp_size):
            layers = self._mapping.stage_layers(stage, self.config.num_hidden_layers)
            if layer in layers:
                return f"transformer.layers.{layer - layers.start}", self._mapping.stage_ranks(stage)
        raise IndexError(layer)

    def _ranks(self, layer: int) -> range:
        return self._place(layer)[1]

    def _read(self, rank: int, name: str) -> Array:
        reader = self._readers[rank]
        if name not in reader:
            raise CheckpointError(f"{reader.path}: tensor {name!r} is missing", "convert the model again")
        return reader.tensor(name)

    def _merge(self, parts: Sequence[Array], split: Split) -> list[Array]:
        if split is Split.QKV:
            return self._merge_qkv(parts)
        return [np.concatenate(parts, axis=1 if split is Split.ROW else 0)]

    def _merge_qkv(self, parts: Sequence[Array]) -> list[Array]:
        """q, k and v; with more ranks than KV heads, some ranks hold copies of one."""
        config = self.config
        query, kv = config.local_heads * config.head_size, config.local_kv_heads * config.head_size
        rows = query + 2 * kv
        if any(len(part) != rows for part in parts):
            raise CheckpointError(
                f"{self.directory}: attention.qkv has {len(parts[0])} rows, but config.json makes it {rows}",
                "take config.json and rank files from one checkpoint",
            )
        copies = max(1, len(parts) // config.num_key_value_heads)
        ranges = (slice(0, query), slice(query, query + kv), slice(query + kv, query + 2 * kv))
        return [
            np.concatenate([part[span] for part in (parts if index == 0 else parts[::copies])])
            for index, span in enumerate(ranges)
        ]

    def _layout(self, stored: Array, name: str) -> Int8Layout:
        """Find the INT8 layout, which no file records: the quantizer leaves a 127 or -128 in each row."""
        if self._int8_layout is None:
            fitting = [layout for layout in _LAYOUTS if _every_row_reaches_its_end(from_layout(stored, layout))]
            if not fitting:
                raise CheckpointError(
                    f"{self.directory}: the layout of the INT8 tensor {name!r} is not known",
                    "convert the model again with int8_layout sm80 or sm90",
                )
            self._int8_layout = fitting[0]
        return self._int8_layout


def _every_row_reaches_its_end(codes: Array) -> bool:
    largest = np.abs(codes.astype(np.int16)).max(axis=1)
    return bool(((largest >= 127) | (largest == 0)).all())
