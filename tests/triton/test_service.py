"""Between Triton and the executor, with both played by the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import EngineError
from trtqwen.executor.request import FinishReason, Request, Response
from trtqwen.triton.service import EngineService
from trtqwen.triton.tensors import Limits

BYTES = (b"a", b"b", b"\xe4", b"\xbd\xa0", b"c")  # ids 2 and 3 are one character


class PlayedExecutor:
    """Takes requests; the test answers them. Dies before its n-th request if told so."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self._callbacks: dict[str, Callable[[Response], None]] = {}
        self._dies_at = dies_at

    def submit(self, request: Request, on_response: Callable[[Response], None]) -> None:
        if len(self.requests) == self._dies_at:
            raise EngineError("the engine has stopped")
        self.requests.append(request)
        self._callbacks[request.id] = on_response

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def answer(self, row: int, *token_ids: int, end: FinishReason | None = None, error: str | None = None) -> None:
        request_id = self.requests[row].id
        self.respond(Response(request_id=request_id, token_ids=token_ids, finish_reason=end, error=error))

    def respond(self, response: Response) -> None:
        self._callbacks[response.request_id](response)


class RecordingSender:
    """Keeps what is sent: (ids, batch_index, final) or an error."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.tensors: list[Mapping[str, npt.NDArray[Any]]] = []
        self.gone = self.full = False
        self.ended = False

    def send(self, tensors: Mapping[str, npt.NDArray[Any]], *, final: bool) -> None:
        assert not self.ended
        if self.full:
            raise OSError("no memory")
        self.ended = final
        self.tensors.append(tensors)
        ids = tensors["output_ids"].reshape(-1).tolist() if tensors else None
        row = tensors["batch_index"].item() if "batch_index" in tensors else None
        self.sent.append((ids, row, final))

    def fail(self, error: str) -> None:
        assert not self.ended
        self.ended = True
        self.sent.append(error)

    def abandoned(self) -> bool:
        assert not self.ended
        return self.gone


def start(rows: int = 1, dies_at: int | None = None, **inputs: Any) -> tuple[Any, ...]:
    executor, sender = PlayedExecutor(dies_at), RecordingSender()
    limits = Limits(vocab_size=5, max_batch_size=8)
    service = EngineService(executor, limits, BYTES, exclude_input=True)  # type: ignore[arg-type]
    service.handle("client", generation(rows, **inputs), sender)
    return executor, sender, service


def generation(rows: int = 1, **inputs: Any) -> dict[str, npt.NDArray[Any]]:
    return {
        "input_ids": np.zeros((rows, 2), np.int32),
        "input_lengths": np.full(rows, 2, np.int32),
        "request_output_len": np.full(rows, 9, np.int32),
        **{name: np.full(rows, value) for name, value in inputs.items()},
    }


def stop(service: EngineService, request_id: str, client_id: str | None = None) -> list[Any]:
    stopper = RecordingSender()
    service.handle(request_id, {"stop": np.array([True])}, stopper, client_id=client_id)
    return stopper.sent


def test_a_stream_is_cut_where_characters_end() -> None:
    executor, sender, _ = start(streaming=True)
    for token_id in (0, 2, 3):
        executor.answer(0, token_id)
    executor.answer(0, 2)
    executor.answer(0, end=FinishReason.END_ID)
    assert sender.sent == [([0], None, False), ([2, 3], None, False), ([2], None, True)]


def test_the_last_token_carries_the_final_flag() -> None:
    executor, sender, _ = start(streaming=True)
    executor.answer(0, 1, end=FinishReason.LENGTH)
    assert sender.sent == [([1], None, True)]


def test_a_response_that_cannot_be_sent_ends_its_request_and_no_other() -> None:
    """Shared memory may be full, and the thread that brings responses serves all requests."""
    for end in (None, FinishReason.LENGTH):
        executor, sender, service = start(rows=2, streaming=True)
        other = RecordingSender()
        service.handle("other", generation(streaming=True), other)
        sender.full = True
        executor.answer(0, 1, end=end)
        assert sender.sent == ["the answer could not be sent: no memory"]
        assert executor.cancelled == [request.id for request in executor.requests[:2]]
        executor.answer(1, 1)
        executor.answer(2, 1, end=FinishReason.LENGTH)
        assert (len(sender.sent), other.sent) == (1, [([1], None, True)])


def test_an_end_without_tokens_is_an_empty_final_response() -> None:
    executor, sender, _ = start(streaming=True)
    executor.answer(0, end=FinishReason.END_ID)
    assert sender.sent == [([], None, True)]


def test_an_unstreamed_answer_is_one_response() -> None:
    executor, sender, _ = start()
    executor.answer(0, 1)
    executor.answer(0, 4, end=FinishReason.STOP_WORDS)
    assert sender.sent == [([1, 4], None, True)]


def test_the_request_decides_about_the_prompt() -> None:
    executor, sender, _ = start(exclude_input_in_output=False)
    executor.answer(0, 4, end=FinishReason.LENGTH)
    assert sender.sent == [([0, 0, 4], None, True)]


def test_a_stream_never_repeats_the_prompt() -> None:
    executor, sender, _ = start(streaming=True, exclude_input_in_output=False)
    executor.answer(0, 4, end=FinishReason.LENGTH)
    assert sender.sent == [([4], None, True)]


def test_rows_end_together() -> None:
    executor, sender, _ = start(rows=2, streaming=True)
    executor.answer(1, 1, end=FinishReason.LENGTH)
    executor.answer(0, 4)
    executor.answer(0, end=FinishReason.END_ID)
    assert sender.sent == [([1], 1, False), ([4], 0, False), ([], 0, True)]


def test_one_rows_error_ends_the_request_and_frees_its_neighbours() -> None:
    executor, sender, _ = start(rows=3)
    executor.answer(1, end=FinishReason.ERROR, error="too long")
    executor.answer(0, 1, end=FinishReason.LENGTH)
    assert sender.sent == ["too long"]
    assert {executor.requests[0].id, executor.requests[2].id} <= set(executor.cancelled)


def test_an_engine_that_dies_between_two_rows_fails_the_request_once() -> None:
    _, sender, _ = start(rows=2, dies_at=1)
    assert sender.sent == ["the engine has stopped"]


def test_a_cancelled_request_ends_empty() -> None:
    for options in ({"streaming": True}, {"exclude_input_in_output": False}):
        executor, sender, _ = start(**options)
        executor.answer(0, 2)
        executor.answer(0, end=FinishReason.CANCELLED)
        assert sender.sent == [([], None, True)]


def test_only_abandoned_requests_are_cancelled() -> None:
    executor, sender, service = start()
    service.cancel_abandoned()
    assert executor.cancelled == []
    sender.gone = True
    service.cancel_abandoned()
    assert executor.cancelled == []  # Triton may be dealing with it
    service.cancel_abandoned()
    assert executor.cancelled == [executor.requests[0].id]
    executor.answer(0, end=FinishReason.CANCELLED)
    service.cancel_abandoned()
    assert len(executor.cancelled) == 1


def test_stop_finds_the_request_by_the_clients_id() -> None:
    executor, sender, service = start(streaming=True)
    stop(service, "other")
    assert executor.cancelled == []
    assert stop(service, "client") == [(None, None, True)]
    assert executor.cancelled == [executor.requests[0].id]
    assert sender.sent == []


def test_a_program_stops_its_own_request_and_a_client_all_with_its_id() -> None:
    executor, _, service = start()
    for own_id in ("first", "second"):
        service.handle(own_id, generation(), RecordingSender(), client_id="client")
    ids = [request.id for request in executor.requests]
    stop(service, "second", client_id="client")
    assert executor.cancelled == [ids[2]]
    stop(service, "client")
    assert executor.cancelled == [ids[2], *ids]


def test_a_program_is_told_its_own_requests_error_when_it_stops_it() -> None:
    executor, _, service = start()
    for own_id in ("first", "second"):
        service.handle(own_id, generation(), RecordingSender(), client_id="client")
    executor.answer(2, end=FinishReason.ERROR, error="broken")
    assert stop(service, "client") == [(None, None, True)]
    assert stop(service, "first", client_id="client") == [(None, None, True)]
    assert stop(service, "second", client_id="client") == ["broken"]
    assert stop(service, "second", client_id="client") == [(None, None, True)]


def test_stop_without_an_id_is_upstreams_error() -> None:
    _, _, service = start()
    assert stop(service, "") == ["Trying to stop a request but request ID is not provided"]


def test_a_bad_request_is_its_own_error() -> None:
    executor, sender, _ = start(beam_width=2)
    assert executor.requests == []
    assert sender.sent == [
        "beam_width: is for beam search, which the embedded engine does not do; leave the tensor out"
    ]


def test_log_probs_and_logits_stay_with_their_tokens() -> None:
    """Two tokens of one character leave together; logits come back in the order of their tokens."""
    executor, sender, _ = start(streaming=True, return_log_probs=True, return_generation_logits=True)
    rows = np.arange(20, dtype=np.float32).reshape(4, 5)
    name = executor.requests[0].id
    for index, (token_id, end) in enumerate([(0, None), (2, None), (3, None), (2, FinishReason.LENGTH)]):
        executor.respond(
            Response(
                request_id=name,
                token_ids=(token_id,),
                log_probs=(-1.0 - index,),
                generation_logits=rows[index].tobytes(),
                context_logits=np.zeros((2, 5), np.float32).tobytes() if index == 0 else None,
                finish_reason=end,
            )
        )
    assert [tensors["output_ids"].reshape(-1).tolist() for tensors in sender.tensors] == [[0], [2, 3], [2]]
    log_probs = [tensors["output_log_probs"].reshape(-1).tolist() for tensors in sender.tensors]
    assert log_probs == [[-1.0], [-2.0, -3.0], [-4.0]]
    assert [tensors["cum_log_probs"].item() for tensors in sender.tensors] == [-1.0, -6.0, -10.0]
    logits = np.concatenate([tensors["generation_logits"][0, 0] for tensors in sender.tensors])
    np.testing.assert_array_equal(logits, rows)
    assert ["context_logits" in tensors for tensors in sender.tensors] == [True, False, False]


def test_return_sequences_are_told_apart() -> None:
    executor, sender, _ = start(num_return_sequences=2)
    executor.answer(1, 4, end=FinishReason.LENGTH)
    executor.answer(0, 1, end=FinishReason.LENGTH)
    assert [tensors["sequence_index"].item() for tensors in sender.tensors] == [1, 0]
    assert [final for _, _, final in sender.sent] == [False, True]
