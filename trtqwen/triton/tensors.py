"""From the input tensors of `tensorrt_llm` to the executor's requests, and from tokens to output tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from trtqwen.errors import RequestError
from trtqwen.runtime.request import Request
from trtqwen.triton.words import unpack_words

Array = npt.NDArray[Any]

_SAMPLING = {
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "temperature": "temperature",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
}
_FIELDS = {
    **{field: name for name, field in _SAMPLING.items()},
    "max_tokens": "request_output_len",
    "input_token_ids": "input_ids",
    "stop_words": "stop_words_list",
}
_READ = {
    *_SAMPLING,
    *("input_ids", "input_lengths", "request_output_len", "end_id", "stop_words_list", "streaming", "stop"),
    *("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"),
    *("pad_id", "decoder_input_ids"),  # carry nothing for a decoder without padding
}
# Values that ask for nothing, beside zero, false and empty, of tensors that the executor does not serve.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "len_penalty": (1,),
    "early_stopping": (1,),  # only chooses among beams
    "runtime_top_p_decay": (1,),
    "runtime_top_p_reset_ids": (-1,),
}


@dataclass(frozen=True)
class Generation:
    """What one Triton request asks for.

    Attributes:
        requests: one a row.
        exclude_input: leave the prompt out of an unstreamed answer; None if the request does not say.
        count_input, count_output: add the token counts to each response.
    """

    requests: tuple[Request, ...]
    streaming: bool
    exclude_input: bool | None
    count_input: bool
    count_output: bool


def read_generation(inputs: Mapping[str, Array], ids: Iterator[str]) -> Generation:
    """Read a request.

    Args:
        inputs: tensors as the backend sees them: scalars [B], input_ids [B, n], word lists [B, 2, N].
        ids: gives each row's request an id.

    Raises:
        RequestError: naming the tensor, if a value is out of range or asks for what the executor does not serve.
    """
    _refuse_unsupported(inputs)
    for name in ("input_ids", "input_lengths", "request_output_len"):
        if name not in inputs:
            raise RequestError(f"{name}: is missing; send it with every request")
    rows = inputs["input_ids"].shape[0]
    return Generation(
        requests=tuple(_request(inputs, row, next(ids)) for row in range(rows)),
        streaming=bool(_any(inputs, "streaming")),
        exclude_input=_any(inputs, "exclude_input_in_output"),
        count_input=bool(_any(inputs, "return_num_input_tokens")),
        count_output=bool(_any(inputs, "return_num_output_tokens")),
    )


def asks_to_stop(inputs: Mapping[str, Array]) -> bool:
    """Whether the request is there to stop another one with its id."""
    return bool(_any(inputs, "stop"))


def write_tokens(generation: Generation, row: int, token_ids: list[int], num_generated: int) -> dict[str, Array]:
    """The output tensors of one response: `output_ids` INT32 [1, 1, n], `sequence_length` INT32 [1, 1], and what
    the request asked for besides.

    Args:
        num_generated: how many of `token_ids` are the answer's.
    """
    tensors: dict[str, Array] = {
        "output_ids": np.array(token_ids, np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(token_ids)]], np.int32),
    }
    if len(generation.requests) > 1:
        tensors["batch_index"] = np.array([[row]], np.int32)
    if generation.count_input:
        tensors["num_input_tokens"] = np.array([[len(generation.requests[row].input_token_ids)]], np.int32)
    if generation.count_output:
        tensors["num_output_tokens"] = np.array([[num_generated]], np.int32)
    return tensors


def _refuse_unsupported(inputs: Mapping[str, Array]) -> None:
    for name, values in inputs.items():
        if name in _READ:
            continue
        if name == "bad_words_list":
            asked = any(unpack_words(name, row) for row in values)
        elif values.dtype == np.object_:
            asked = bool(values.any())
        else:
            asked = not np.isin(values, (0, *_NEUTRAL.get(name, ()))).all()
        if asked:
            raise RequestError(f"{name}: is not supported by the embedded engine; leave the tensor out")


def _any(inputs: Mapping[str, Array], name: str) -> bool | None:
    return bool(inputs[name].any()) if name in inputs else None


def _request(inputs: Mapping[str, Array], row: int, request_id: str) -> Request:
    length = _scalar(inputs, "input_lengths", row)
    width = inputs["input_ids"].shape[1]
    if not 0 < length <= width:
        raise RequestError(f"input_lengths: {length} is not between 1 and the {width} ids of input_ids; correct it")
    fields: dict[str, Any] = {
        "id": request_id,
        "input_token_ids": inputs["input_ids"][row, :length].tolist(),
        "max_tokens": _scalar(inputs, "request_output_len", row),
        "sampling": {field: _scalar(inputs, name, row) for name, field in _SAMPLING.items() if name in inputs},
    }
    if fields["sampling"].get("top_p", 0) <= 0:
        fields["sampling"].pop("top_p", None)  # as upstream: counts as not given
    if "end_id" in inputs and (end_id := _scalar(inputs, "end_id", row)) >= 0:
        fields["end_id"] = end_id
    if "stop_words_list" in inputs:
        fields["stop_words"] = unpack_words("stop_words_list", inputs["stop_words_list"][row])
    try:
        return Request.model_validate(fields)
    except ValidationError as problem:
        raise RequestError(_first_problem(problem)) from None


def _scalar(inputs: Mapping[str, Array], name: str, row: int) -> Any:
    return inputs[name].reshape(-1)[row].item()


def _first_problem(problem: ValidationError) -> str:
    first = problem.errors()[0]
    field = str(first["loc"][1] if first["loc"][0] == "sampling" else first["loc"][0])
    name = _FIELDS.get(field, field)
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]} (got {first['input']!r}); correct the tensor"
