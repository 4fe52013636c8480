"""The program of `tensorrt_llm_bls`, with the other models played by the test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtqwen.diagnostics import RequestError
from trtqwen.hf.text_stream import StopStrings
from trtqwen.triton.bls import BlsSettings, answer

SETTINGS = BlsSettings(llm="engine", accumulate_tokens=False, outputs=("cum_log_probs", "sequence_index"))


class PlayedModels:
    """`preprocessing` and `postprocessing` that turn characters to ids and back, and an engine that says its lines.

    Args:
        lines: (sequence_index, text) of each response; an exception is raised.
        lost_error: what the engine tells when it is asked to stop.
    """

    def __init__(self, *lines: tuple[int, str] | RequestError, lost_error: str | None = None) -> None:
        self._lines = lines
        self._lost_error = lost_error
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.read = 0

    def call(
        self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        self.asked.append((model, dict(inputs)))
        if model == "preprocessing":
            return {"INPUT_ID": np.array([[7]], np.int32), "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"]}
        assert (model, list(outputs)) == ("postprocessing", ["OUTPUT"])
        text = "".join(map(chr, inputs["TOKENS_BATCH"].reshape(-1)))
        return {"OUTPUT": np.array([text.encode()], np.object_)}

    def stream(
        self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        self.asked.append((model, dict(inputs)))
        if "stop" in inputs:
            if self._lost_error is not None:
                raise RequestError(self._lost_error)
            return
        assert list(outputs) == ["output_ids", "sequence_length", "cum_log_probs", "sequence_index"]
        for line in self._lines:
            self.read += 1
            if isinstance(line, RequestError):
                raise line
            sequence, text = line
            yield {
                "output_ids": np.array([[[ord(character) for character in text]]], np.int32),
                "sequence_length": np.array([[len(text)]], np.int32),
                "sequence_index": np.array([[sequence]], np.int32),
            }
        yield {}

    @property
    def stops(self) -> list[str]:
        return [model for model, inputs in self.asked if "stop" in inputs]


class RecordingSender:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sequences: list[int] = []
        self.error: str | None = None
        self.ended = False

    def send(self, tensors: Mapping[str, npt.NDArray[Any]], *, final: bool) -> None:
        assert not self.ended
        self.ended = final
        if tensors:
            assert set(tensors) == {"text_output", "sequence_index"}
            self.texts.append(tensors["text_output"].item().decode())
            self.sequences.append(tensors["sequence_index"].item())

    def fail(self, error: str) -> None:
        assert not self.ended
        self.ended, self.error = True, error

    def abandoned(self) -> bool:
        return False


def ask(models: PlayedModels, settings: BlsSettings = SETTINGS, **inputs: Any) -> RecordingSender:
    request = {
        "text_input": np.array([[b"Say: "]], np.object_),
        "max_tokens": np.array([[9]], np.int32),
        "stream": np.array([[True]]),
        **inputs,
    }
    sender = RecordingSender()
    answer(models, settings, request, sender)
    assert sender.ended
    return sender


def words(*texts: str) -> npt.NDArray[Any]:
    return np.array([[text.encode() for text in texts]], np.object_)


def test_the_steps_are_the_ensembles() -> None:
    models = PlayedModels((0, "Hel"), (0, "lo"))
    sender = ask(models, temperature=np.array([[0.5]], np.float32), top_k=np.array([[3]], np.int32))
    assert sender.texts == ["Hel", "lo"]
    (_, preprocessing), (_, engine), *_ = models.asked
    assert set(preprocessing) == {"QUERY", "REQUEST_OUTPUT_LEN"}
    assert set(engine) == {"input_ids", "request_output_len", "streaming", "temperature", "runtime_top_k"}


def test_scalars_without_their_dimension_get_it_back_and_old_names_pass() -> None:
    models = PlayedModels((0, "x"))
    ask(models, return_log_probs=np.array([True]), random_seed=np.array([[5]], np.uint64))
    _, engine = models.asked[1]
    assert engine["return_log_probs"].shape == (1, 1)
    assert engine["random_seed"].tolist() == [[5]]


def test_a_stop_word_in_other_tokens_ends_the_answer_and_the_engines_work() -> None:
    models = PlayedModels((0, "one, tw"), (0, "o, three"), (0, ", four"))
    sender = ask(models, stop_words=words("", "two", "four"))
    assert sender.texts == ["one, tw", "o"]
    assert models.stops[0] == "engine"
    assert models.read == 3  # read to its end: Triton keeps a stream open that is not


def test_return_sequences_end_one_by_one() -> None:
    models = PlayedModels((0, "a."), (1, "b"), (0, "more"), (1, "c."), (1, "more"))
    sender = ask(models, stop_words=words("."), num_return_sequences=np.array([[2]], np.int32))
    assert list(zip(sender.sequences, sender.texts, strict=True)) == [(0, "a."), (1, "b"), (1, "c.")]


def test_the_prompts_own_words_do_not_stop_an_unstreamed_answer() -> None:
    sender = ask(PlayedModels((0, "Say: a: b")), stream=np.array([[False]]), stop_words=words(":"))
    assert sender.texts == ["Say: a:"]


def test_accumulated_chunks_carry_the_text_so_far() -> None:
    settings = BlsSettings(llm="engine", accumulate_tokens=True, outputs=SETTINGS.outputs)
    assert ask(PlayedModels((0, "a"), (0, "b"), (0, "c")), settings).texts == ["a", "ab", "abc"]
    whole = ask(PlayedModels((0, "abc")), settings, stream=np.array([[False]]))
    assert whole.texts == ["abc"]


def test_an_error_is_a_sentence_whenever_it_comes() -> None:
    assert ask(PlayedModels(RequestError("too long"))).error == "too long"
    late = ask(PlayedModels((0, "a"), RequestError("broken")))
    assert (late.texts, late.error) == (["a"], "broken")
    lost = ask(PlayedModels((0, "a"), lost_error="the engine has stopped"))
    assert (lost.texts, lost.error) == (["a"], "the engine has stopped")


@pytest.mark.parametrize("name", ["image_input", "image_url_input", "num_draft_tokens"])
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    models = PlayedModels((0, "a"))
    assert (ask(models, SETTINGS, **{name: np.array([[1]])}).error or "").startswith(f"{name}: needs a ")
    assert models.asked == []
    assert ask(models, SETTINGS, **{name: np.array([[0]])}).texts == ["a"]


@given(st.text("ab.", max_size=12), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3), st.data())
def test_however_a_text_is_cut_it_ends_with_the_first_stop_word(text: str, stops: list[str], data: Any) -> None:
    stream, joined, rest = StopStrings(stops, keep=True), "", text
    while rest and stream.found is None:
        length = data.draw(st.integers(1, len(rest)))
        joined += stream.push(rest[:length])
        rest = rest[length:]
    ends = [text.find(word) + len(word) for word in stops if word in text]
    assert joined == text[: min(ends, default=len(text))]
    assert (stream.found is not None) == bool(ends)
