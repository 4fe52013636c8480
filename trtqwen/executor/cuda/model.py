"""Qwen2 on one rank and one card: the plain model's formulas (executor/model.py, layer.py) with fused operators.

A layer has two halves. Each takes the hidden states and the output of the half before, so that one kernel computes
the sum, the norm and the quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.executor.cuda.batch import CudaBatch
from trtqwen.executor.cuda.kernels.activation import silu_mul
from trtqwen.executor.cuda.kernels.context_attention import context_attention
from trtqwen.executor.cuda.kernels.decode_attention import DecodeWorkspace, decode_attention
from trtqwen.executor.cuda.kernels.embed import embed
from trtqwen.executor.cuda.kernels.gemv import gemv
from trtqwen.executor.cuda.kernels.matmul import matmul
from trtqwen.executor.cuda.kernels.norm import add_norm
from trtqwen.executor.cuda.kernels.quantize import quantize_rows
from trtqwen.executor.cuda.kernels.rotary import rotary_store
from trtqwen.executor.cuda.linear import (
    HalfLinear,
    Linear,
    LinearLoader,
    Norm,
    SmoothQuantLinear,
    WeightOnlyLinear,
    fold_smoother,
)
from trtqwen.executor.cuda.weights import Uploader, to_float
from trtqwen.executor.linear import Tensors, check_activation, need
from trtqwen.executor.parallel import Communicator
from trtqwen.nn.rotary import make_rotary
from trtqwen.quantize.weight_only import Int8Layout


@dataclass(frozen=True)
class _Layer:
    input_gain: Tensor
    qkv: Linear
    dense: Linear
    post_gain: Tensor
    gate_up: Linear
    proj: Linear
    kv_step: float | None


@dataclass(frozen=True)
class _SingleLayer:
    qkv: HalfLinear | WeightOnlyLinear
    dense: HalfLinear | WeightOnlyLinear
    gate_up: HalfLinear | WeightOnlyLinear
    proj: HalfLinear | WeightOnlyLinear


class CudaModel:
    """One rank's share of the model. Its KV cache is allocated later, when the free memory is known.

    Args:
        tensors: this rank's checkpoint file.
        max_batch_size: sequences of a step.
        max_seq_len: positions.

    Raises:
        CheckpointError: if a tensor is missing, or the checkpoint asks for what this engine does not compute.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tensors: Tensors,
        communicator: Communicator,
        *,
        int8_layout: Int8Layout | None,
        dtype: torch.dtype,
        device: torch.device,
        max_batch_size: int,
        max_seq_len: int,
    ) -> None:
        check_activation(config)
        self._config = config
        self._communicator = communicator
        self._dtype = dtype
        self._device = device
        self._max_seq_len = max_seq_len
        upload = Uploader(device)

        def table(name: str) -> Tensor:
            return upload(need(tensors, name)).to(dtype)

        loader = LinearLoader(config, int8_layout, dtype, upload)
        count = len(config.rank_mapping.stage_layers(communicator.stage, config.num_hidden_layers))
        self._layers = [self._load(tensors, f"transformer.layers.{index}", loader, upload) for index in range(count)]
        self._embedding = table("transformer.vocab_embedding.weight") if communicator.is_first else None
        self._gain = table("transformer.ln_f.weight") if communicator.is_last else None
        self._head = table("lm_head.weight") if communicator.is_last else None
        upload.close()
        rotary = make_rotary(config.rotary_base, config.head_size, config.rotary_scaling, device)
        cos, sin = rotary.cos_sin(torch.arange(max_seq_len, device=device), dtype)
        half = config.head_size // 2
        self._rotary = torch.stack([cos[:, 0, :half], sin[:, 0, :half]], dim=1).float().contiguous()
        heads, kv_heads = config.local_heads, config.local_kv_heads
        self._workspace = DecodeWorkspace(max_batch_size, heads, kv_heads, config.head_size, device)
        self._cache = torch.empty(0)
        self._singles = self._find_singles()

    def kv_block_bytes(self, tokens_per_block: int, kv_dtype: torch.dtype) -> int:
        """Memory of one KV cache block in all layers of this rank."""
        config = self._config
        values = 2 * config.local_kv_heads * tokens_per_block * config.head_size
        return len(self._layers) * values * kv_dtype.itemsize

    def allocate_cache(self, num_blocks: int, tokens_per_block: int, kv_dtype: torch.dtype) -> None:
        """Allocate the KV cache; release an earlier one first."""
        config = self._config
        self._cache = torch.empty(0)
        shape = (len(self._layers), 2, num_blocks, config.local_kv_heads, tokens_per_block, config.head_size)
        self._cache = torch.zeros(shape, dtype=kv_dtype, device=self._device)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Reduce the model to two layers, which launch every kernel of the whole model, for compilation."""
        layers, singles = self._layers, self._singles
        self._layers, self._singles = layers[:2], None if singles is None else singles[:2]
        try:
            yield
        finally:
            self._layers, self._singles = layers, singles

    @torch.inference_mode()
    def forward(self, batch: CudaBatch, sampled: Tensor) -> Tensor | None:
        """Queue a step; see `loop.Runner`. Logits are in the dtype of the computation."""
        communicator = self._communicator
        hidden: Tensor
        delta: Tensor | None
        hidden, delta = self._begin(batch, sampled), None
        if len(hidden) == 1 and batch.all_rows and self._singles is not None:
            return self._single(hidden, self._singles, batch)
        for index, layer in enumerate(self._layers):
            delta = communicator.all_reduce(self._attend(index, layer, hidden, delta, batch))
            if communicator.is_last and index == len(self._layers) - 1 and not batch.all_rows:
                # Nothing but the logits reads what the last MLP makes.
                rows = batch.logit_rows.long()
                hidden, delta = hidden[rows], delta[rows]
            delta = communicator.all_reduce(self._mlp(layer, hidden, delta))
        if self._gain is None or self._head is None:
            communicator.send(hidden if delta is None else hidden + delta)
            logits = None
        else:
            normed = add_norm(hidden, delta, self._gain, self._config.norm_epsilon, None)
            assert isinstance(normed, Tensor)
            logits = communicator.gather(matmul(normed, self._head, None))
        padded = -(-self._config.vocab_size // communicator.tp_size) * communicator.tp_size
        if communicator.size > 1:
            rows = torch.empty((len(batch.logit_rows), padded), dtype=self._dtype, device=self._device)
            logits = communicator.to_rank_0(logits, rows)
        return None if logits is None else logits[:, : self._config.vocab_size]

    def _single(self, hidden: Tensor, layers: Sequence[_SingleLayer], batch: CudaBatch) -> Tensor:
        """A step of one token on one card: norms, activations and sums are part of the matrix products."""
        epsilon = self._config.norm_epsilon
        for index, layer in enumerate(layers):
            qkv = layer.qkv.single(hidden, norm=Norm(self._layers[index].input_gain, epsilon))
            layer.dense.single(self._attention(index, qkv, batch), residual=hidden)
            active = layer.gate_up.single(hidden, norm=Norm(self._layers[index].post_gain, epsilon), silu=True)
            layer.proj.single(active, residual=hidden)
        assert self._head is not None
        assert self._gain is not None
        return gemv(hidden, self._head, hidden.dtype, gain=self._gain, epsilon=epsilon)

    def _begin(self, batch: CudaBatch, sampled: Tensor) -> Tensor:
        config, communicator = self._config, self._communicator
        if self._embedding is None:
            shape = (len(batch.token_ids), config.hidden_size)
            return communicator.receive(torch.empty(shape, dtype=self._dtype, device=self._device))
        by_vocab = config.use_parallel_embedding and config.embedding_sharding_dim == 0
        first = communicator.tp_rank * len(self._embedding) if by_vocab else 0
        hidden = embed(batch.token_ids, sampled, self._embedding, first)
        if not config.use_parallel_embedding:
            return hidden
        return communicator.all_reduce(hidden) if by_vocab else communicator.all_gather(hidden)

    def _attend(self, index: int, layer: _Layer, hidden: Tensor, delta: Tensor | None, batch: CudaBatch) -> Tensor:
        normed = add_norm(hidden, delta, layer.input_gain, self._config.norm_epsilon, layer.qkv.quantization)
        attended = self._attention(index, layer.qkv(normed), batch)
        how = layer.dense.quantization
        return layer.dense(attended if how is None else quantize_rows(attended, how))

    def _attention(self, index: int, qkv: Tensor, batch: CudaBatch) -> Tensor:
        """Compute attention, [tokens, heads * head_size], from packed queries, keys and values."""
        keys, values = self._cache[index]
        kv_step = self._layers[index].kv_step
        width = self._config.local_heads * self._config.head_size
        attended = torch.empty((len(qkv), width), dtype=qkv.dtype, device=self._device)
        if batch.generation:
            decode_attention(
                qkv,
                self._rotary,
                batch.kv_slots,
                keys,
                values,
                batch.block_ids,
                batch.block_begins,
                batch.context_lengths[: batch.generation],
                attended,
                self._workspace,
                longest=self._max_seq_len,
                kv_step=kv_step,
            )
        if batch.tiles is not None:
            rotary_store(
                qkv,
                self._rotary,
                batch.positions,
                batch.kv_slots,
                keys,
                values,
                kv_step,
                first_token=batch.generation,
            )
            context_attention(
                qkv,
                keys,
                values,
                batch.tiles,
                batch.block_ids,
                batch.block_begins,
                batch.query_begins,
                batch.context_lengths,
                attended,
                kv_step=kv_step,
                cached=batch.cached,
            )
        return attended

    def _mlp(self, layer: _Layer, hidden: Tensor, delta: Tensor) -> Tensor:
        normed = add_norm(hidden, delta, layer.post_gain, self._config.norm_epsilon, layer.gate_up.quantization)
        if isinstance(layer.gate_up, HalfLinear):
            return layer.proj(layer.gate_up.silu(normed))
        return layer.proj(silu_mul(layer.gate_up(normed), layer.proj.quantization))

    def _find_singles(self) -> list[_SingleLayer] | None:
        """Return the layers for steps of one token, if this rank has the whole model and its layers support them."""
        singles = []
        for layer in self._layers:
            linears = (layer.qkv, layer.dense, layer.gate_up, layer.proj)
            if not all(isinstance(linear, HalfLinear | WeightOnlyLinear) for linear in linears):
                return None
            singles.append(_SingleLayer(*linears))  # type: ignore[arg-type]
        return singles if self._communicator.size == 1 and self._dtype != torch.float32 else None

    def _load(self, tensors: Tensors, prefix: str, loader: LinearLoader, upload: Uploader) -> _Layer:
        attention, mlp = f"{prefix}.attention", f"{prefix}.mlp"

        def linear(names: Sequence[str], to_int: str) -> Linear:
            return loader.load(tensors, names, to_int)

        # In TensorRT-LLM `fc` goes through SiLU (Hugging Face's gate_proj) and `gate` does not (up_proj).
        gate_up = linear([f"{mlp}.fc", f"{mlp}.gate"], f"{prefix}.post_layernorm.scale_to_int")
        proj = linear([f"{mlp}.proj"], f"{mlp}.quantization_scaling_factor")
        if isinstance(gate_up, SmoothQuantLinear) and isinstance(proj, SmoothQuantLinear):
            gate_up, proj = fold_smoother(gate_up, proj)
        int8_kv = self._config.quantization.kv_cache_quant_algo == "INT8"
        return _Layer(
            input_gain=upload(need(tensors, f"{prefix}.input_layernorm.weight")).to(self._dtype),
            qkv=linear([f"{attention}.qkv"], f"{prefix}.input_layernorm.scale_to_int"),
            dense=linear([f"{attention}.dense"], f"{attention}.quantization_scaling_factor"),
            post_gain=upload(need(tensors, f"{prefix}.post_layernorm.weight")).to(self._dtype),
            gate_up=gate_up,
            proj=proj,
            kv_step=to_float(need(tensors, f"{attention}.kv_cache_scaling_factor")) if int8_kv else None,
        )
