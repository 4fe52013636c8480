"""Steps on a GPU: small ones and those that only generate are replayed as CUDA graphs, the others run eager."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trtqwen.executor.cuda.batch import TILE_ROWS, CudaBatch, context_tiles, with_tiles
from trtqwen.executor.cuda.model import CudaModel
from trtqwen.executor.cuda.shapes import GraphShape, graph_shapes, idle, pad
from trtqwen.executor.inputs import Counts, StepInputs, aligned

_STAGES = 4  # host buffers: more than steps are in flight


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
        self._shapes = graph_shapes(max_batch_size, max_num_tokens)
        blocks = max_batch_size * max_blocks
        largest = Counts(max_num_tokens, max_batch_size, 0, max_num_tokens, blocks)
        rooms = [(max_num_tokens // TILE_ROWS + max_batch_size, largest)]
        rooms += [(shape.tiles, shape.counts(blocks)) for shape in self._shapes]
        size = max(aligned(2 * tiles) + counts.total for tiles, counts in rooms)
        self._data = torch.zeros(size, dtype=torch.int32, device=device)
        self._stages = deque(_Stage(size) for _ in range(_STAGES))
        self._graphs: dict[GraphShape, _Graph] = {}
        self._pool: tuple[int, int] | None = None

    def launch(self, inputs: StepInputs, sampled: Tensor) -> Tensor | None:
        """Queue a step; see `loop.Runner`."""
        shape = next((shape for shape in self._graphs if shape.fits(inputs.counts)), None)
        if shape is None:
            tiles = context_tiles(inputs)
            self._upload(with_tiles(inputs, tiles))
            return self._model.forward(CudaBatch.of(self._data, inputs, len(tiles)), sampled)
        padded = pad(inputs, shape)
        self._upload(with_tiles(padded, context_tiles(padded, shape.tiles)))
        graph = self._graphs[shape]
        graph.graph.replay()
        return None if graph.logits is None else graph.logits[: inputs.counts.logits]

    @torch.inference_mode()
    def capture(self, sampled: Tensor) -> None:
        """Record one graph for each shape; they share their memory, as no two run at once.

        Launch each shape once before: a recording cannot load kernels.
        """
        recorded = {}
        for shape in reversed(self._shapes):
            inputs = idle(shape)
            self._upload(with_tiles(inputs, context_tiles(inputs, shape.tiles)))
            batch = CudaBatch.of(self._data, inputs, shape.tiles)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                logits = self._model.forward(batch, sampled)
            self._pool = graph.pool()
            recorded[shape] = _Graph(graph, logits)
        self._graphs = dict(reversed(recorded.items()))  # the smallest first

    def _upload(self, data: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
        stage = self._stages[0]
        self._stages.rotate(-1)
        stage.read.synchronize()
        stage.buffer.numpy()[: len(data)] = data
        self._data[: len(data)].copy_(stage.buffer[: len(data)], non_blocking=True)
        stage.read.record()
