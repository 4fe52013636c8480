"""Steps on a GPU: eager for prompts, replayed as CUDA graphs for batches that only generate."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trtqwen.executor.cuda.batch import TILE_ROWS, CudaBatch, context_tiles
from trtqwen.executor.cuda.model import CudaModel
from trtqwen.executor.inputs import Counts, StepInputs, pad_generation

_STAGES = 4  # host buffers: more than steps are in flight


def graph_sizes(max_batch_size: int) -> list[int]:
    """Return the batch sizes of CUDA graphs: few for a fast start, and close to each other for little padding."""
    sizes = {1, 2, 4, max_batch_size, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)}
    return sorted(size for size in sizes if size <= max_batch_size)


def idle_generation(size: int) -> StepInputs:
    """Return a generation step of `size` sequences that neither reads nor writes the KV cache."""
    counts = Counts(size, size, size, size, 0)
    inputs = StepInputs(counts, np.zeros(counts.total, np.int32))
    inputs.kv_slots[:] = -1
    inputs.query_begins[:] = np.arange(size + 1)
    inputs.logit_rows[:] = np.arange(size)
    return inputs


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor | None


class _Stage:
    """A pinned buffer on the host, and an event for the device's copy of it."""

    def __init__(self, size: int) -> None:
        self.buffer = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.read = torch.cuda.Event()  # type: ignore[no-untyped-call]


class CudaRunner:
    """Launches steps of a model.

    Args:
        max_blocks: KV cache blocks of one sequence at most.
    """

    def __init__(
        self, model: CudaModel, device: torch.device, *, max_batch_size: int, max_num_tokens: int, max_blocks: int
    ) -> None:
        self._model = model
        self._device = device
        tiles = 2 * (max_num_tokens // TILE_ROWS + max_batch_size + 1)
        size = 5 * max_num_tokens + 4 * max_batch_size + 64 + max_batch_size * max_blocks + tiles
        self._data = torch.zeros(size, dtype=torch.int32, device=device)
        self._stages = deque(_Stage(size) for _ in range(_STAGES))
        self._graphs: dict[int, _Graph] = {}
        self._pool: tuple[int, int] | None = None

    def launch(self, inputs: StepInputs, sampled: Tensor) -> Tensor | None:
        """Queue a step; see `loop.Runner`."""
        counts = inputs.counts
        if self._graphs and counts.tokens == counts.generation == counts.logits:
            size = next((size for size in sorted(self._graphs) if size >= counts.tokens), None)
            if size is not None:
                self._upload(pad_generation(inputs, size).data)
                graph = self._graphs[size]
                graph.graph.replay()
                return None if graph.logits is None else graph.logits[: counts.tokens]
        tiles = context_tiles(inputs)
        self._upload(np.concatenate([inputs.data, tiles.reshape(-1)]) if len(tiles) else inputs.data)
        return self._model.forward(CudaBatch.of(self._data, inputs, len(tiles)), sampled)

    @torch.inference_mode()
    def capture(self, sizes: list[int], sampled: Tensor) -> None:
        """Record one graph for each batch size; they share their memory, as no two run at once.

        Launch each size once before: a recording cannot load kernels.
        """
        for size in sorted(sizes, reverse=True):
            inputs = idle_generation(size)
            self._upload(inputs.data)
            batch = CudaBatch.of(self._data, inputs, 0)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                logits = self._model.forward(batch, sampled)
            self._pool = graph.pool()
            self._graphs[size] = _Graph(graph, logits)

    def _upload(self, data: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
        stage = self._stages[0]
        self._stages.rotate(-1)
        stage.read.synchronize()
        stage.buffer.numpy()[: len(data)] = data
        self._data[: len(data)].copy_(stage.buffer[: len(data)], non_blocking=True)
        stage.read.record()
