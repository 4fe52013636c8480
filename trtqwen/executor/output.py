"""Outputs of responses besides tokens: log probabilities, logits, times and blocks, if a request asks for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trtqwen.executor.log_probs import Likeliest, likeliest, log_probs_of
from trtqwen.executor.request import Event, PerfMetrics, PromptLogProbs, Request, Response, TopLogProbs
from trtqwen.executor.sampling import Sampled
from trtqwen.executor.sequence import Chunk, Generated, SequenceState, Step


@dataclass
class _Record:
    """A request's times in ns, and the collected results of its prompt's logits."""

    request: Request
    arrival: int
    context_logits: list[Tensor] = field(default_factory=list)
    prompt_log_probs: list[Tensor] = field(default_factory=list)
    prompt_top: list[Likeliest] = field(default_factory=list)
    prompt_told: bool = False
    first_scheduled: int = 0
    first_token: int = 0
    last_token: int = 0
    blocks: int = 0
    reused: int = 0


class OutputCollector:
    """Collects the outputs that a request's `OutputConfig` asks for, over several steps."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._readers: set[str] = set()  # ids of those that want to hear of their prompts

    @property
    def plain(self) -> bool:
        """Whether no request wants more than tokens and, with the last one, its times."""
        return not self._readers

    def arrived(self, request: Request) -> None:
        """Record the arrival of a request that asks for more than tokens."""
        if request.output.return_perf_metrics or request.output.reads_whole_prompt:
            self._records[request.id] = _Record(request, time.monotonic_ns())
        if request.output.reads_whole_prompt:
            self._readers.add(request.id)

    def scheduled(self, sequences: Sequence[SequenceState]) -> None:
        """Record times and blocks of a step's sequences."""
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
        if not self._readers or not any(map(_reads_prompt, step.chunks)):
            return logits
        sampled = []
        for chunk, rows in zip(
            step.chunks, torch.split(logits, [chunk.num_logits for chunk in step.chunks]), strict=True
        ):
            if _reads_prompt(chunk):
                _read_prompt(self._records[chunk.request_id], chunk, rows)
            if chunk.samples:
                sampled.append(rows[-1])
        return torch.stack(sampled) if sampled else logits[:0]

    def complete(self, response: Response, sampled: Sampled) -> Response:
        """A sampling step's response with everything that its request asks for."""
        record = self._records.get(response.request_id)
        update: dict[str, object] = {}
        if response.token_ids and sampled.log_prob is not None:
            update["log_probs"] = (sampled.log_prob,)
        if response.token_ids and sampled.top is not None:
            update["top_log_probs"] = _top_log_probs([sampled.top])
        if response.token_ids and sampled.logits is not None:
            update["generation_logits"] = _to_bytes(sampled.logits)
        if record is not None:
            record.last_token = time.monotonic_ns()
            record.first_token = record.first_token or record.last_token
            if record.context_logits:
                update["context_logits"] = b"".join(map(_to_bytes, record.context_logits))
                record.context_logits.clear()
            if record.request.output.return_prompt_log_probs and not record.prompt_told and response.token_ids:
                record.prompt_told = True
                update["prompt_log_probs"] = _prompt_log_probs(record)
            if record.request.output.return_perf_metrics and response.finish_reason is not None:
                update["perf_metrics"] = _perf_metrics(record)
        return response.model_copy(update=update) if update else response

    def timed(self, generated: Sequence[Generated]) -> list[Event | Generated]:
        """A plain step's tokens; the last one of a request that asks for its times goes with them."""
        if not self._records:
            return list(generated)
        now = time.monotonic_ns()
        events: list[Event | Generated] = []
        for one in generated:
            record = self._records.get(one.request_id)
            if record is None:
                events.append(one)
                continue
            record.first_token = record.first_token or now
            if one.finish_reason is None:
                events.append(one)
            else:
                record.last_token = now
                events.append(
                    Event(response=one.response().model_copy(update={"perf_metrics": _perf_metrics(record)}))
                )
        return events

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._records.pop(request_id, None)
        self._readers.discard(request_id)


def _reads_prompt(chunk: Chunk) -> bool:
    """Whether the logits of a chunk's tokens are those after prompt tokens that the request wants to hear of."""
    request = chunk.sequence.request
    return (
        request.output.reads_whole_prompt
        and chunk.num_logits == len(chunk.token_ids)
        and chunk.end <= len(request.input_token_ids)
    )


def _read_prompt(record: _Record, chunk: Chunk, rows: Tensor) -> None:
    output, prompt = record.request.output, record.request.input_token_ids
    if chunk.start == 0:  # a paused request begins again
        record.context_logits.clear()
        record.prompt_log_probs.clear()
        record.prompt_top.clear()
    if output.return_context_logits:
        record.context_logits.append(rows.float().clone())
    following = prompt[chunk.start + 1 : chunk.end + 1]
    if output.return_prompt_log_probs and following:
        places = rows[: len(following)]
        record.prompt_log_probs.append(log_probs_of(places, torch.tensor(following, device=rows.device)))
        if output.num_top_log_probs:
            record.prompt_top.append(likeliest(places, output.num_top_log_probs))


def _prompt_log_probs(record: _Record) -> PromptLogProbs:
    values = torch.cat([torch.tensor([torch.nan]), *record.prompt_log_probs])
    count = record.request.output.num_top_log_probs
    if not count:
        return PromptLogProbs(log_probs=_to_bytes(values))
    width = record.prompt_top[0].ids.shape[1] if record.prompt_top else count
    first = Likeliest(torch.full((1, width), -1, dtype=torch.int32), torch.full((1, width), torch.nan))
    return PromptLogProbs(log_probs=_to_bytes(values), top=_top_log_probs([first, *record.prompt_top]))


def _top_log_probs(parts: Sequence[Likeliest]) -> TopLogProbs:
    ids, values = torch.cat([part.ids for part in parts]), torch.cat([part.log_probs for part in parts])
    return TopLogProbs(ids=_to_bytes(ids), log_probs=_to_bytes(values))


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
