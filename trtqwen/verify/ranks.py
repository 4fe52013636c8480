"""A stored checkpoint, computed layer by layer in one process: all ranks of a layer, then the next layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.artifact.names import rank_weights
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.diagnostics import CheckpointError
from trtqwen.executor.layer import RankLayer
from trtqwen.executor.linear import LinearLoader
from trtqwen.nn.ops import to_torch
from trtqwen.nn.rotary import Rotary, make_rotary
from trtqwen.recipe import Int8LayoutChoice
from trtqwen.safetensors_io.format import Array
from trtqwen.safetensors_io.reader import SafetensorsReader

EMBEDDING = "transformer.vocab_embedding.weight"
NORM = "transformer.ln_f.weight"
LM_HEAD = "lm_head.weight"


class CheckpointRanks:
    """The rank files of a checkpoint, memory-mapped; computes in float32 with the weights and scales they hold.

    Args:
        int8_layout: how INT8 weight-only matrices lie in the files; `plain` if they are not INT8.

    Attributes:
        non_finite: names of tensors read so far that hold infinities or NaNs, with their file.

    Raises:
        CheckpointError: if a rank file or config.json is missing or damaged.
    """

    embedding_name, norm_name, head_name = EMBEDDING, NORM, LM_HEAD

    def __init__(self, directory: Path, int8_layout: Int8LayoutChoice, device: torch.device) -> None:
        self.config = read_checkpoint_config(directory)
        self.mapping = self.config.rank_mapping
        self.readers = [
            SafetensorsReader(directory / rank_weights(rank), CheckpointError)
            for rank in range(self.mapping.world_size)
        ]
        self.non_finite: list[str] = []
        self._device = device
        layout = None if int8_layout == "plain" else int8_layout
        self._loader = LinearLoader(self.config, layout, torch.float32, device)
        config = self.config
        self._rotary = make_rotary(config.rotary_base, config.head_size, config.rotary_scaling, device)

    @property
    def through_float16(self) -> bool:
        """Whether every weight was rounded to float16 first, as NVIDIA's calibrated path does."""
        quantization = self.config.quantization
        return quantization.kv_cache_quant_algo == "INT8" or "SQ" in (quantization.quant_algo or "")

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings of a sequence as the first stage's ranks together make them, float32 [tokens, hidden]."""
        return to_torch(self.embedding_rows(np.array(token_ids))[0]).to(self._device, torch.float32)

    def embedding_rows(self, rows: Array) -> list[Array]:
        """Rows of the embedding, each [rows, hidden]: every rank's copy, or one joined from their shares."""
        tables = [self.readers[rank].tensor(EMBEDDING) for rank in self.mapping.stage_ranks(0)]
        if not self.config.use_parallel_embedding:
            return [table[rows] for table in tables]
        if self.config.embedding_sharding_dim == 1:
            return [np.concatenate([table[rows] for table in tables], axis=1)]
        return [_sharded_rows(tables, rows)]

    def final_gains(self) -> list[Array]:
        """Weights of the final norm, [hidden], of every rank of the last stage."""
        return [self.readers[rank].tensor(NORM) for rank in self._last_ranks()]

    def head_rows(self, rows: Array) -> Array:
        """Rows of lm_head, [rows, hidden], joined from the last stage's ranks."""
        return _sharded_rows([self.readers[rank].tensor(LM_HEAD) for rank in self._last_ranks()], rows)

    def layer(self, index: int) -> CheckpointLayer:
        """Load one decoder layer of all tensor-parallel ranks.

        Raises:
            CheckpointError: if a tensor is missing or its precision is not known.
        """
        config, mapping = self.config, self.mapping
        stages = [mapping.stage_layers(stage, config.num_hidden_layers) for stage in range(mapping.pp_size)]
        stage = next(number for number, layers in enumerate(stages) if index in layers)
        prefix = f"transformer.layers.{index - stages[stage].start}"
        shares = []
        for rank in mapping.stage_ranks(stage):
            reader = self.readers[rank]
            tensors = {name: reader.tensor(name) for name in reader if name.startswith(f"{prefix}.")}
            for name, tensor in tensors.items():
                self.check_finite(reader, name, tensor)
            shares.append(RankLayer(config, tensors, prefix, self._loader, torch.float32, self._device))
            for name in tensors:
                reader.release(name)
        return CheckpointLayer(shares, self._rotary)

    def check_finite(self, reader: SafetensorsReader, name: str, tensor: Array) -> None:
        """Note a tensor that holds infinities or NaNs."""
        if tensor.dtype != np.int8 and not np.isfinite(tensor).all():
            self.non_finite.append(f"{reader.path.name}: {name}")

    def release(self, name: str) -> None:
        """Release the memory of a tensor in every rank that has it."""
        for reader in self.readers:
            if name in reader:
                reader.release(name)

    def _last_ranks(self) -> range:
        return self.mapping.stage_ranks(self.mapping.pp_size - 1)


class CheckpointLayer:
    """One decoder layer, its tensor-parallel shares added up in process."""

    def __init__(self, shares: Sequence[RankLayer], rotary: Rotary) -> None:
        self._shares = shares
        self._rotary = rotary

    @torch.inference_mode()
    def attention(self, hidden: Tensor) -> Tensor:
        """What attention adds to the hidden states of one sequence, [tokens, hidden]."""
        cos, sin = self._rotary.cos_sin(torch.arange(len(hidden), device=hidden.device), hidden.dtype)
        total = torch.zeros_like(hidden)
        for share in self._shares:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in share.qkv(hidden, cos, sin))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0]
            total += share.dense(attended.transpose(0, 1))
        return total

    @torch.inference_mode()
    def mlp(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to the hidden states, [tokens, hidden]."""
        total = torch.zeros_like(hidden)
        for share in self._shares:
            total += share.mlp(hidden)
        return total


def _sharded_rows(shards: Sequence[Array], rows: Array) -> Array:
    """Rows [rows, hidden] of a table whose rows are divided evenly, shard after shard."""
    each = len(shards[0])
    result = np.empty((len(rows), shards[0].shape[1]), shards[0].dtype)
    for index, shard in enumerate(shards):
        mine = (rows >= index * each) & (rows < (index + 1) * each)
        result[mine] = shard[rows[mine] - index * each]
    return result
