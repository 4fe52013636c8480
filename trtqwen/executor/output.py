"""What responses carry beside tokens: log probabilities, logits, times and blocks, for the requests that ask."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor

from trtqwen.executor.request import PerfMetrics, Request, Response
from trtqwen.executor.sampling import Sampled
from trtqwen.executor.scheduler import Sequence, Step


@dataclass
class _Record:
    """A request's times, ns, and its context logits so far."""

    wants_perf_metrics: bool
    arrival: int
    context_logits: list[Tensor]
    first_scheduled: int = 0
    first_token: int = 0
    last_token: int = 0
    blocks: int = 0
    reused: int = 0


class OutputCollector:
    """Gathers over the steps what a request's `OutputConfig` asks for; costs nothing for the others."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def arrived(self, request: Request) -> None:
        """Note the time of a request that wants more than tokens."""
        if request.output.return_perf_metrics or request.output.return_context_logits:
            self._records[request.id] = _Record(request.output.return_perf_metrics, time.monotonic_ns(), [])

    def scheduled(self, sequences: Ordered[Sequence]) -> None:
        """Note times and blocks of a step's sequences."""
        if not self._records:
            return
        for sequence in sequences:
            record = self._records.get(sequence.request.id)
            if record is not None:
                record.first_scheduled = record.first_scheduled or time.monotonic_ns()
                record.blocks, record.reused = len(sequence.block_ids), sequence.num_reused

    def computed(self, step: Step, logits: Tensor) -> Tensor:
        """Take in a step's logits, [rows that want them, vocab_size], before they are sampled from.

        Returns:
            The rows to sample from, [chunks that sample, vocab_size].
        """
        if all(chunk.num_logits == chunk.samples for chunk in step.chunks):
            return logits
        sampled = []
        for chunk, rows in zip(
            step.chunks, torch.split(logits, [chunk.num_logits for chunk in step.chunks]), strict=True
        ):
            if chunk.num_logits > chunk.samples:
                record = self._records[chunk.request_id]
                if chunk.start == 0:
                    record.context_logits.clear()  # a paused request begins again
                record.context_logits.append(rows.float().clone())
            if chunk.samples:
                sampled.append(rows[-1])
        return torch.stack(sampled) if sampled else logits[:0]

    def complete(self, response: Response, sampled: Sampled) -> Response:
        """A sampling step's response with everything that its request asks for."""
        record = self._records.get(response.request_id)
        update: dict[str, object] = {}
        if response.token_ids and sampled.log_prob is not None:
            update["log_probs"] = (sampled.log_prob,)
        if response.token_ids and sampled.logits is not None:
            update["generation_logits"] = _to_bytes(sampled.logits)
        if record is not None:
            record.last_token = time.monotonic_ns()
            record.first_token = record.first_token or record.last_token
            if record.context_logits:
                update["context_logits"] = b"".join(map(_to_bytes, record.context_logits))
                record.context_logits.clear()
            if record.wants_perf_metrics and response.finish_reason is not None:
                update["perf_metrics"] = _perf_metrics(record)
        return response.model_copy(update=update) if update else response

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended."""
        self._records.pop(request_id, None)


def _perf_metrics(record: _Record) -> PerfMetrics:
    return PerfMetrics(
        arrival_time_ns=record.arrival,
        first_scheduled_time_ns=record.first_scheduled,
        first_token_time_ns=record.first_token,
        last_token_time_ns=record.last_token,
        kv_cache_alloc_total_blocks=record.blocks,
        kv_cache_alloc_new_blocks=record.blocks - record.reused,
        kv_cache_reused_blocks=record.reused,
    )


def _to_bytes(logits: Tensor) -> bytes:
    return logits.cpu().numpy().tobytes()
