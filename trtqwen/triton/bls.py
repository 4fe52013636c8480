"""The logic of `tensorrt_llm_bls`: the ensemble's steps as a program, which also finds stop words in the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import RequestError
from trtqwen.hf.text_stream import StopStrings
from trtqwen.triton.carrier import Sender
from trtqwen.triton.contract import refuse_unserved, step_maps

Array = npt.NDArray[Any]
Place = tuple[int, int]  # batch_index, sequence_index

_UNSUPPORTED = {
    "image_input": "a vision model",
    "image_bytes_input": "a vision model",
    "image_url_input": "a vision model",
    "video_bytes_input": "a vision model",
    "num_draft_tokens": "a draft model",
    "use_draft_logits": "a draft model",
}


class Models(Protocol):
    """The repository's other models, called with a unique request id. Their errors become `RequestError`."""

    def call(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """One request, one response."""

    def stream(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Iterator[dict[str, Array]]:
        """One request to a decoupled model, its responses as they come."""


@dataclass(frozen=True)
class BlsSettings:
    """How `tensorrt_llm_bls` is set up.

    Attributes:
        llm: name of the model with the engine.
        accumulate_tokens: each chunk of a stream carries the whole text so far.
        outputs: its output tensors but the text; the engine's have the same names.
    """

    llm: str
    accumulate_tokens: bool
    outputs: tuple[str, ...]


def answer(models: Models, settings: BlsSettings, inputs: Mapping[str, Array], sender: Sender) -> None:
    """Serve one request to its end. An error of the request or of the models becomes its response."""
    try:
        for tensors in _responses(models, settings, inputs):
            sender.send(tensors, final=False)
        stop(models, settings)  # tells why, if the stream has ended with an error that Triton lost
        sender.send({}, final=True)  # as upstream: the engine's last response is not marked
    except RequestError as problem:
        sender.fail(str(problem))


def stop(models: Models, settings: BlsSettings) -> None:
    """Stop the engine's work for the request.

    Raises:
        RequestError: if the request has ended with an error, which only the embedded engine reports.
    """
    inputs = {
        "input_ids": np.zeros((1, 1), np.int32),
        "input_lengths": np.ones((1, 1), np.int32),
        "request_output_len": np.ones((1, 1), np.int32),
        "stop": np.array([[True]]),
    }
    for _ in models.stream(settings.llm, inputs, ["output_ids"]):
        pass


def _responses(models: Models, settings: BlsSettings, inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    refuse_unserved(inputs, _UNSUPPORTED)
    # Scalars that the config reshapes come without their last dimension.
    known = {
        name: value[:, None] if value.ndim == 1 else value
        for name, value in inputs.items()
        if name not in _UNSUPPORTED
    }
    texts = _Texts(known, accumulate=settings.accumulate_tokens)
    (to_ids, from_ids), (to_llm, _) = step_maps("preprocessing"), step_maps("tensorrt_llm")
    ids = models.call("preprocessing", _mapped(known, to_ids), list(from_ids))
    unmapped = {name: known[name] for name in known.keys() - set(to_ids.values()) - set(to_llm.values())}
    known |= {from_ids[name]: value for name, value in ids.items()}
    wanted = ["output_ids", "sequence_length", *settings.outputs]
    # What the maps do not know has one name everywhere: those of older releases are of that kind.
    for tensors in models.stream(settings.llm, {**unmapped, **_mapped(known, to_llm)}, wanted):
        if "output_ids" not in tensors or texts.ended(tensors):
            continue  # to the end: a stream that is not read to its end stays open
        tokens = {"TOKENS_BATCH": tensors.pop("output_ids"), "SEQUENCE_LENGTH": tensors.pop("sequence_length")}
        pieces = models.call("postprocessing", tokens, ["OUTPUT"])["OUTPUT"]
        yield {"text_output": texts.push(tensors, b"".join(pieces.reshape(-1)).decode()), **tensors}
        if texts.all_ended():
            stop(models, settings)


class _Texts:
    """The texts of a request: one for each row and return sequence."""

    def __init__(self, inputs: Mapping[str, Array], *, accumulate: bool) -> None:
        rows = inputs["text_input"].shape[0]
        words = inputs.get("stop_words", np.zeros((rows, 0), np.object_))
        self._prompts = [_text(prompt) for prompt in inputs["text_input"].reshape(-1)]
        self._stop_words = [[_text(word) for word in row if word] for row in words.reshape(rows, -1)]
        self._streaming = bool(inputs["stream"].any()) if "stream" in inputs else False
        self._accumulate = accumulate and self._streaming
        returned = inputs["num_return_sequences"].reshape(-1) if "num_return_sequences" in inputs else np.ones(rows)
        self._count = int(np.maximum(returned, 1).sum())
        self._stops: dict[Place, StopStrings] = {}
        self._so_far: dict[Place, str] = {}

    def push(self, tensors: Mapping[str, Array], piece: str) -> Array:
        """`text_output` of one response."""
        row, _ = place = _place(tensors)
        stops = self._stops.setdefault(place, StopStrings(self._stop_words[row], keep=True))
        # An unstreamed answer may begin with the prompt, in which stop words do not count.
        prompt = self._prompts[row] if not self._streaming and piece.startswith(self._prompts[row]) else ""
        text = prompt + stops.push(piece[len(prompt) :])
        if self._accumulate:
            text = self._so_far[place] = self._so_far.get(place, "") + text
        return np.array([text.encode()], np.object_)

    def ended(self, tensors: Mapping[str, Array]) -> bool:
        """Whether the text that a response continues has ended."""
        place = _place(tensors)
        return place in self._stops and self._stops[place].found is not None

    def all_ended(self) -> bool:
        return sum(stops.found is not None for stops in self._stops.values()) == self._count


def _mapped(tensors: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    return {inner: tensors[outer] for inner, outer in names.items() if outer in tensors}


def _place(tensors: Mapping[str, Array]) -> Place:
    row, sequence = (
        int(tensors[name].item()) if name in tensors else 0 for name in ("batch_index", "sequence_index")
    )
    return row, sequence


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")  # preprocessing refuses what is not UTF-8
