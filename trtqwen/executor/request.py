"""Requests and responses between a client of the executor and its step loop."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0)]
Word = Annotated[tuple[TokenId, ...], Field(min_length=1)]
MOST_TOP_LOG_PROBS = 100
GuideType = Literal["json", "json_schema", "regex", "ebnf_grammar", "structural_tag"]


def _is_bias(value: float) -> float:
    if math.isnan(value) or value == math.inf:
        raise ValueError("Input should be a finite number, or -inf to forbid a token")
    return value


class _Message(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="constants",
    )


class SamplingConfig(_Message):
    """Sampling parameters. As in TensorRT-LLM, a request is greedy unless top_k, top_p or min_p is given.

    Attributes:
        top_k: sample from the k most likely tokens; 0 is no limit, 1 is greedy.
        top_p: sample from the most likely tokens that together reach this probability; 0 counts as not given.
        min_p: sample from the tokens that are at least this fraction as likely as the most likely; 0 is no limit.
        temperature: divides the logits.
        seed: of the request's own random numbers.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
        presence_penalty, frequency_penalty: subtracted for answer tokens, once, and once for each occurrence.
        min_tokens: end and stop ids count only after this many tokens.
    """

    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    min_tokens: Annotated[int, Field(ge=0)] = 0

    @property
    def greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0 or (self.top_k == 0 and self.top_p == 0 and self.min_p == 0)


class OutputConfig(_Message):
    """Outputs of a response besides tokens.

    Attributes:
        return_log_probs: each token's log probability by the model itself, before penalties and masks.
        return_context_logits: the logits after every prompt token; such a request reuses no KV cache blocks.
        return_generation_logits: the logits that each token was chosen from, before penalties and masks.
        return_perf_metrics: times and blocks, with the last response.
        num_top_log_probs: number of most likely tokens at each position with log probabilities.
        return_prompt_log_probs: each prompt token's log probability; such a request reuses no KV cache blocks.
    """

    return_log_probs: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False
    return_perf_metrics: bool = False
    num_top_log_probs: Annotated[int, Field(ge=0, le=MOST_TOP_LOG_PROBS)] = 0
    return_prompt_log_probs: bool = False

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether the logits after every prompt token are needed."""
        return self.return_context_logits or self.return_prompt_log_probs


class GuidedDecodingParams(_Message):
    """The guide of an answer: any JSON, or a schema, a regular expression or a grammar."""

    guide_type: GuideType
    guide: str = ""


class Request(_Message):
    """One generation request.

    Attributes:
        id: unique among the requests in flight.
        input_token_ids: the prompt.
        max_tokens: answer tokens at most; lowered to what max_seq_len leaves, as TensorRT-LLM does.
        end_id: this token ends the answer and is not part of it.
        stop_words: token sequences that end the answer and are part of it.
        bad_words: token sequences that are never completed.
        embedding_bias: added to the logits, by token id; -inf forbids a token.
        cache_salt: requests reuse KV cache blocks of those with the same salt alone.
        priority: a smaller one is served first, by engines that serve by priority.
        owner: owner of the request; guides of different owners are compiled in turn.
    """

    id: str
    input_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(gt=0)]
    end_id: int | None = None
    stop_words: tuple[Word, ...] = ()
    bad_words: tuple[Word, ...] = ()
    embedding_bias: dict[TokenId, Annotated[float, AfterValidator(_is_bias)]] = {}
    sampling: SamplingConfig = SamplingConfig()
    output: OutputConfig = OutputConfig()
    guided_decoding: GuidedDecodingParams | None = None
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    owner: Annotated[str, Field(max_length=256)] = ""


class FinishReason(str, Enum):
    """Why a request ended; the names are TensorRT-LLM's."""

    END_ID = "end_id"
    STOP_WORDS = "stop_words"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class PerfMetrics(_Message):
    """Metrics of a request, with TensorRT-LLM's names: nanoseconds of a monotonic clock, and KV cache blocks."""

    arrival_time_ns: int
    first_scheduled_time_ns: int
    first_token_time_ns: int
    last_token_time_ns: int
    kv_cache_alloc_total_blocks: int
    kv_cache_alloc_new_blocks: int
    kv_cache_reused_blocks: int


class TopLogProbs(_Message):
    """The most likely tokens at each of some places.

    Attributes:
        ids: int32 [places, count].
        log_probs: float32 [places, count].
    """

    ids: bytes
    log_probs: bytes


class PromptLogProbs(_Message):
    """Log probabilities of a prompt's tokens.

    Attributes:
        log_probs: float32 [prompt tokens]; NaN for the first one, which follows nothing.
        top: the most likely tokens at each place, -1 at the first; None unless asked for.
    """

    log_probs: bytes
    top: TopLogProbs | None = None


class Response(_Message):
    """New tokens of a request; the last response carries a finish reason.

    Attributes:
        token_ids: the tokens since the response before.
        log_probs: one for each of them, if asked for.
        context_logits: float32 [prompt tokens, vocab_size], with the first token.
        generation_logits: float32 [tokens of this response, vocab_size].
        top_log_probs: the most likely tokens in place of each of this response's, if asked for.
        prompt_log_probs: of the prompt's tokens, with the first token of the answer.
        error: what went wrong, if `finish_reason` is `ERROR`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    context_logits: bytes | None = None
    generation_logits: bytes | None = None
    top_log_probs: TopLogProbs | None = None
    prompt_log_probs: PromptLogProbs | None = None
    perf_metrics: PerfMetrics | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class IterationStats(_Message):
    """Statistics of the executor's steps, in requests, tokens and blocks.

    Attributes:
        iterations: steps taken since the start.
        context_tokens, generation_tokens: tokens computed in them.
        active, waiting: requests in the batch, and in front of it.
        max_active: most requests that ever shared a step.
        paused: how often a request lost its blocks to an older request.
        used_blocks, max_blocks: KV cache blocks.
        reused_blocks: how often a block was found computed already, since the start.
        context_requests, generation_requests: those of the batch in either phase.
        step_context_tokens: prompt tokens of the last step; 0 if nothing runs.
        paused_requests: those that wait for blocks that were taken from them.
    """

    iterations: int = 0
    context_tokens: int = 0
    generation_tokens: int = 0
    active: int = 0
    waiting: int = 0
    max_active: int = 0
    paused: int = 0
    used_blocks: int = 0
    max_blocks: int = 0
    reused_blocks: int = 0
    context_requests: int = 0
    generation_requests: int = 0
    step_context_tokens: int = 0
    paused_requests: int = 0


class Command(_Message):
    """A message from the client to rank 0, one JSON object per line. Exactly one field is set."""

    request: Request | None = None
    cancel: str | None = None
    stats: bool = False


class Event(_Message):
    """A message from a rank to the client, in the frames of `wire`. Exactly one field is set."""

    ready: bool = False
    response: Response | None = None
    stats: IterationStats | None = None
    fatal: str | None = None
