"""What a request asks for beyond upstream's tensors: JSON in a parameter of the request (docs/extensions.md)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from trtqwen.diagnostics import RequestError
from trtqwen.triton.contract import EXTENSIONS


class Extensions(BaseModel):
    """Extensions of upstream's tensors in a request.

    Attributes:
        min_p: sample from tokens at least so likely, relative to the most likely one.
        num_top_log_probs: number of most likely tokens at each place. `output_log_probs` then has a row with
            the log probabilities of the chosen tokens, as many with the ids of the most likely ones, and as many with
            their log probabilities.
        return_prompt_log_probs: `context_logits` has such a column for each prompt token instead of logits; the first
            token, which follows nothing, has NaN and ids of -1.
        cache_salt: reuse KV cache blocks of requests with the same salt alone.
        priority: a smaller one is served first; vLLM with scheduling-policy priority does so.
        owner: owner of the request; guides of different owners are compiled in turn.
        tell_stop: a request that another client stops ends with an error; otherwise with an empty response, as
            upstream's do.
        carry: open a carrier of this name on the request's stream, and generate nothing; see `triton.carrier`.
        carrier: name of the carrier for the answer's tokens, and the answer's number there. A stop request with it
            stops that answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_p: float = 0.0
    num_top_log_probs: int = 0
    return_prompt_log_probs: bool = False
    cache_salt: str = ""
    priority: int = 0
    owner: str = ""
    tell_stop: bool = False
    carry: str = ""
    carrier: tuple[str, int] | None = None


NO_EXTENSIONS = Extensions()


def read_extensions(text: str) -> Extensions:
    """Read what a request asks for beyond upstream's tensors.

    Args:
        text: JSON; empty asks for nothing.

    Raises:
        RequestError: naming the key that is invalid.
    """
    try:
        return Extensions.model_validate_json(text) if text else NO_EXTENSIONS
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(map(str, first["loc"])) or "its value"
        raise RequestError(f"parameter {EXTENSIONS}: {name}: {first['msg'].lower()}", "correct it") from None
