"""A client's own values are the client's fault: refused by the gateway, or told from failures of the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import Request, SamplingConfig
from trtqwen.executor.sampling import Sampler
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.executor.sequence import SequenceState
from trtqwen.gateway.api.schemas import ChatRequest, GenerateRequest
from trtqwen.gateway.errors import from_engine
from trtqwen.triton.tensors import Limits, read_generation

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN = {"text_input": "x", "max_tokens": 1}
LIMITS = SchedulerConfig(
    max_batch_size=4, max_num_tokens=8, max_seq_len=64, tokens_per_block=4, num_blocks=4, vocab_size=10
)


@pytest.mark.parametrize("penalty", [1e-50, 1e-38, 0.0099, 10.1])
def test_a_repetition_penalty_that_float32_cannot_bear_is_refused(penalty: float) -> None:
    for schema, body in ((ChatRequest, CHAT), (GenerateRequest, PLAIN)):
        with pytest.raises(ValidationError, match="repetition_penalty"):
            schema.model_validate({**body, "repetition_penalty": penalty})
        schema.model_validate({**body, "repetition_penalty": 0.01})


@pytest.mark.parametrize("name", ["temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_no_number_of_a_plain_request_becomes_infinite(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        GenerateRequest.model_validate({**PLAIN, name: 1e300})
    GenerateRequest.model_validate({**PLAIN, name: 10})


def add(length: int, **limits: Any) -> None:
    config = SchedulerConfig(**{**vars(LIMITS), **limits})
    Scheduler(config).add(Request(id="a", input_token_ids=(1,) * length, max_tokens=8))


def leave_no_token() -> None:
    request = Request(id="a", input_token_ids=(1,), max_tokens=8, end_id=0, sampling=SamplingConfig(min_tokens=5))
    logits = torch.full((1, 1), 1.0)
    [result] = Sampler(1, torch.device("cpu")).sample(logits, [SequenceState(request, 8, [0], slot=0)])
    assert isinstance(result, RequestError)
    raise result


def read_zero() -> None:
    inputs = {
        "input_ids": np.array([[1]], np.int32),
        "input_lengths": np.array([[1]], np.int32),
        "request_output_len": np.array([[1]], np.int32),
        "repetition_penalty": np.array([[0]], np.float32),
    }
    read_generation(inputs, iter(["a"]), Limits(10, 4))


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        (lambda: add(9, enable_chunked_context=False), "context_length_exceeded"),
        (lambda: add(12), "context_length_exceeded"),
        (leave_no_token, "no_token_left"),
        (read_zero, "invalid_value"),
    ],
)
def test_what_the_engine_refuses_is_the_clients_fault(fail: Any, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        fail()
    error = from_engine(str(caught.value))
    assert (error.status, error.code) == (400, code), error.message


def test_anything_else_is_the_engines_fault() -> None:
    assert from_engine("the logits are not finite; convert the model to bfloat16").status == 500
