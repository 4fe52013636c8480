"""From the input tensors of `tensorrt_llm` to the executor's requests, and from tokens to output tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import (
    GuidedDecodingParams,
    GuideType,
    OutputConfig,
    PerfMetrics,
    PromptLogProbs,
    Request,
    TopLogProbs,
)
from trtqwen.triton.extensions import NO_EXTENSIONS, Extensions
from trtqwen.triton.words import unpack_words

Array = npt.NDArray[Any]

_SAMPLING = {
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "temperature": "temperature",
    "seed": "seed",
    "random_seed": "seed",  # its name before 1.0
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
    "min_length": "min_tokens",  # its name before 1.0
}
_OUTPUT = {
    "return_log_probs": "return_log_probs",
    "return_context_logits": "return_context_logits",
    "return_generation_logits": "return_generation_logits",
    "return_perf_metrics": "return_perf_metrics",
    "return_kv_cache_reuse_stats": "return_perf_metrics",  # its name before 0.19
}
_WORDS = {"stop_words_list": "stop_words", "bad_words_list": "bad_words"}
_FIELDS = {
    **{field: name for name, field in reversed(_SAMPLING.items())},
    **{field: name for name, field in _WORDS.items()},
    "max_tokens": "request_output_len",
    "input_token_ids": "input_ids",
}
_READ = {
    *_SAMPLING,
    *_OUTPUT,
    *_WORDS,
    *("input_ids", "input_lengths", "request_output_len", "end_id", "streaming", "stop", "num_return_sequences"),
    *("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"),
    *("embedding_bias", "guided_decoding_guide_type", "guided_decoding_guide"),
    *("pad_id", "decoder_input_ids"),  # carry nothing for a decoder without padding
}
# Values that ask for nothing, besides zero, false and empty, of tensors that the executor does not serve.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "beam_width": (1,),
    "len_penalty": (1,),
    "runtime_top_p_decay": (1,),
    "runtime_top_p_reset_ids": (-1,),
}
_FOR_BEAMS = ("beam_width", "len_penalty", "early_stopping", "beam_search_diversity_rate")


@dataclass(frozen=True)
class Limits:
    """Limits of an engine for a request's tensors."""

    vocab_size: int
    max_batch_size: int


@dataclass(frozen=True)
class Place:
    """The place of a sequence in a Triton request: its row, and its number among the row's return sequences."""

    row: int
    sequence: int


@dataclass(frozen=True)
class Generation:
    """The content of one Triton request.

    Attributes:
        requests: one for each sequence that is returned.
        places: theirs, in the same order.
        exclude_input: leave the prompt out of an unstreamed answer; None if the request does not say.
        count_input, count_output: add the token counts to each response.
        tell_stop: an answer that another client stops ends with an error.
        carrier: name of the carrier for its tokens, and its number there.
    """

    requests: tuple[Request, ...]
    places: tuple[Place, ...]
    streaming: bool
    exclude_input: bool | None
    count_input: bool
    count_output: bool
    tell_stop: bool = False
    carrier: tuple[str, int] | None = None

    @property
    def carriable(self) -> bool:
        """Return whether its responses before the last one contain only tokens of one sequence."""
        if len(self.requests) > 1 or not self.streaming or self.count_input or self.count_output:
            return False
        output = self.requests[0].output
        return output == OutputConfig(return_perf_metrics=output.return_perf_metrics)


@dataclass(frozen=True)
class Part:
    """The content of one response for a sequence.

    Attributes:
        token_ids: the prompt's, where it is repeated, and the answer's.
        num_generated: how many of them are the answer's.
        log_probs: one for each of the answer's.
        cum_log_prob: their sum since the answer began.
        context_logits, generation_logits: float32 rows of vocab_size, or None.
        top_log_probs: the most likely tokens in place of each of the answer's.
    """

    token_ids: list[int]
    num_generated: int
    log_probs: list[float]
    cum_log_prob: float
    context_logits: bytes | None = None
    generation_logits: bytes | None = None
    perf_metrics: PerfMetrics | None = None
    top_log_probs: Sequence[TopLogProbs] = ()
    prompt_log_probs: PromptLogProbs | None = None


def read_generation(
    inputs: Mapping[str, Array], ids: Iterator[str], limits: Limits, own: Extensions = NO_EXTENSIONS
) -> Generation:
    """Read a request.

    Args:
        inputs: tensors as the backend sees them: scalars [B], input_ids [B, n], word lists [B, 2, N].
        ids: gives each sequence's request an id.

    Raises:
        RequestError: naming the tensor, if a value is out of range or asks for what the executor does not serve.
    """
    _refuse_unsupported(inputs)
    for name in ("input_ids", "input_lengths", "request_output_len"):
        if name not in inputs:
            raise RequestError(f"{name}: is missing", "send it with every request")
    requests: list[Request] = []
    places: list[Place] = []
    for row in range(inputs["input_ids"].shape[0]):
        fields = _fields(inputs, row, limits)
        fields["sampling"]["min_p"] = own.min_p
        fields["output"] |= own.model_dump(include={"num_top_log_probs", "return_prompt_log_probs"})
        fields |= {"cache_salt": own.cache_salt, "priority": own.priority, "owner": own.owner}
        for sequence in range(_num_return_sequences(inputs, row, limits)):
            requests.append(_request(fields, next(ids), sequence))
            places.append(Place(row, sequence))
    return Generation(
        requests=tuple(requests),
        places=tuple(places),
        streaming=bool(_any(inputs, "streaming")),
        exclude_input=_any(inputs, "exclude_input_in_output"),
        count_input=bool(_any(inputs, "return_num_input_tokens")),
        count_output=bool(_any(inputs, "return_num_output_tokens")),
        tell_stop=own.tell_stop,
        carrier=own.carrier,
    )


def asks_to_stop(inputs: Mapping[str, Array]) -> bool:
    """Return whether the request stops another one with the same id."""
    return bool(_any(inputs, "stop"))


def write_part(generation: Generation, index: int, part: Part) -> dict[str, Array]:
    """The output tensors of one response: `output_ids` INT32 [1, 1, n], `sequence_length` INT32 [1, 1], and what
    the request asked for besides.

    Args:
        index: the sequence's place among the request's.
    """
    request, place = generation.requests[index], generation.places[index]
    tensors: dict[str, Array] = {
        "output_ids": np.array(part.token_ids, np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(part.token_ids)]], np.int32),
    }
    if generation.places[-1].row > 0:
        tensors["batch_index"] = np.array([[place.row]], np.int32)
    if any(other.sequence > 0 for other in generation.places):
        tensors["sequence_index"] = np.array([[place.sequence]], np.int32)
    if generation.count_input:
        tensors["num_input_tokens"] = np.array([[len(request.input_token_ids)]], np.int32)
    if generation.count_output:
        tensors["num_output_tokens"] = np.array([[part.num_generated]], np.int32)
    if request.output.return_log_probs:
        tensors["output_log_probs"] = np.array(part.log_probs, np.float32).reshape(1, 1, -1)
        tensors["cum_log_probs"] = np.array([[part.cum_log_prob]], np.float32)
    if part.context_logits is not None:
        rows = len(request.input_token_ids)
        tensors["context_logits"] = np.frombuffer(part.context_logits, np.float32).reshape(1, rows, -1)
    if part.generation_logits:
        rows = part.num_generated
        tensors["generation_logits"] = np.frombuffer(part.generation_logits, np.float32).reshape(1, 1, rows, -1)
    if part.top_log_probs:
        columns = [tensors["output_log_probs"].reshape(-1, 1), *_columns(part.top_log_probs, part.num_generated)]
        tensors["output_log_probs"] = np.hstack(columns).T[None]
    if part.prompt_log_probs is not None:
        log_probs = np.frombuffer(part.prompt_log_probs.log_probs, np.float32).reshape(-1, 1)
        top = () if part.prompt_log_probs.top is None else _columns((part.prompt_log_probs.top,), len(log_probs))
        tensors["context_logits"] = np.hstack([log_probs, *top])[None]
    if part.perf_metrics is not None:
        for name, value in part.perf_metrics.model_dump().items():
            tensors[name] = np.array([[value]], np.int64 if name.endswith("_ns") else np.int32)
    return tensors


def _columns(top: Sequence[TopLogProbs], places: int) -> tuple[Array, Array]:
    """Ids and log probabilities of likely tokens, float32 [places, count] each: enough for ids below 2**24."""
    ids = np.frombuffer(b"".join(part.ids for part in top), np.int32).reshape(places, -1)
    values = np.frombuffer(b"".join(part.log_probs for part in top), np.float32).reshape(places, -1)
    return ids.astype(np.float32), values


def _refuse_unsupported(inputs: Mapping[str, Array]) -> None:
    for name, values in inputs.items():
        if name in _READ:
            continue
        if values.dtype == np.object_:
            asked = bool(values.any())
        else:
            asked = not np.isin(values, (0, *_NEUTRAL.get(name, ()))).all()
        if asked and name in _FOR_BEAMS:
            raise RequestError(
                f"{name}: is for beam search, which the embedded engine does not do", "leave the tensor out"
            )
        if asked:
            raise RequestError(f"{name}: is not supported by the embedded engine", "leave the tensor out")


def _any(inputs: Mapping[str, Array], name: str) -> bool | None:
    return bool(inputs[name].any()) if name in inputs else None


def _fields(inputs: Mapping[str, Array], row: int, limits: Limits) -> dict[str, Any]:
    """The fields of a row's request, all but its id."""
    length = _scalar(inputs, "input_lengths", row)
    width = inputs["input_ids"].shape[1]
    if not 0 < length <= width:
        raise RequestError(f"input_lengths: {length} is not between 1 and the {width} ids of input_ids", "correct it")
    fields: dict[str, Any] = {
        "input_token_ids": inputs["input_ids"][row, :length].tolist(),
        "max_tokens": _scalar(inputs, "request_output_len", row),
        "sampling": {field: _scalar(inputs, name, row) for name, field in _SAMPLING.items() if name in inputs},
        "output": {field: bool(_scalar(inputs, name, row)) for name, field in _OUTPUT.items() if name in inputs},
        "embedding_bias": _embedding_bias(inputs, row, limits.vocab_size),
        "guided_decoding": _guided_decoding(inputs, row),
    }
    if fields["sampling"].get("top_p", 0) <= 0:
        fields["sampling"].pop("top_p", None)  # as upstream: counts as not given
    if "end_id" in inputs and (end_id := _scalar(inputs, "end_id", row)) >= 0:
        fields["end_id"] = end_id
    for name, field in _WORDS.items():
        if name in inputs:
            fields[field] = unpack_words(name, inputs[name][row])
    return fields


def _request(fields: Mapping[str, Any], request_id: str, sequence: int) -> Request:
    """The request of a row's n-th return sequence; as upstream, each has a seed of its own."""
    sampling = fields["sampling"]
    if sequence:
        sampling = {**sampling, "seed": (sampling.get("seed", 0) + sequence) % 2**64}
    try:
        return Request.model_validate({**fields, "id": request_id, "sampling": sampling})
    except ValidationError as problem:
        raise RequestError(_first_problem(problem)) from None


def _num_return_sequences(inputs: Mapping[str, Array], row: int, limits: Limits) -> int:
    count = int(_scalar(inputs, "num_return_sequences", row)) if "num_return_sequences" in inputs else 1
    if not 0 <= count <= limits.max_batch_size:
        raise RequestError(
            (
                f"num_return_sequences: {count} is not between 1 and the engine's max_batch_size "
                f"{limits.max_batch_size}"
            ),
            "correct it",
        )
    return count or 1


def _embedding_bias(inputs: Mapping[str, Array], row: int, vocab_size: int) -> dict[int, float]:
    bias = inputs["embedding_bias"][row] if "embedding_bias" in inputs else np.zeros(0)
    if bias.size not in (0, vocab_size):
        raise RequestError(
            (
                f"embedding_bias: has {bias.size} values, but the model's vocabulary, padding included, "
                f"has {vocab_size}"
            ),
            "send one for each",
        )
    token_ids = np.flatnonzero(bias)
    return dict(zip(token_ids.tolist(), bias[token_ids].tolist(), strict=True))


def _guided_decoding(inputs: Mapping[str, Array], row: int) -> GuidedDecodingParams | None:
    guide_type = _text(inputs, "guided_decoding_guide_type", row)
    guide = _text(inputs, "guided_decoding_guide", row)
    if not guide_type:
        if guide:
            raise RequestError(
                "guided_decoding_guide_type: is missing, but there is guided_decoding_guide", "send both"
            )
        return None
    if guide_type not in get_args(GuideType):
        raise RequestError(
            f"guided_decoding_guide_type: is {guide_type!r}", f"send one of {', '.join(get_args(GuideType))}"
        )
    if not guide and guide_type != "json":
        raise RequestError(f"guided_decoding_guide: is missing for guide type {guide_type}", "send it")
    return GuidedDecodingParams.model_validate({"guide_type": guide_type, "guide": guide})


def _text(inputs: Mapping[str, Array], name: str, row: int) -> str:
    if name not in inputs or not inputs[name].size:
        return ""
    try:
        return bytes(_scalar(inputs, name, row)).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise RequestError(f"{name}: byte {problem.start} is not UTF-8", "send the text as UTF-8") from None


def _scalar(inputs: Mapping[str, Array], name: str, row: int) -> Any:
    value = inputs[name].reshape(-1)[row]
    return value.item() if isinstance(value, np.generic) else value


def _first_problem(problem: ValidationError) -> str:
    first = problem.errors()[0]
    field = str(first["loc"][1] if first["loc"][0] in ("sampling", "output") else first["loc"][0])
    name = _FIELDS.get(field, field)
    text = first["msg"].removeprefix("Value error, ")
    return f"{name}: {text[0].lower()}{text[1:]} (got {first['input']!r}); correct the tensor"
