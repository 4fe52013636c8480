"""The tokens of many answers on one stream, between an executor and senders that the test plays."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.triton.test_service import BYTES, PlayedExecutor, RecordingSender, generation
from tests.waiting import GENEROUS, wait_for
from trtqwen.executor.request import FinishReason
from trtqwen.triton import carrier
from trtqwen.triton.service import EngineService
from trtqwen.triton.tensors import Limits


class CarrierSender:
    """Keeps what a carrier sends; while `busy` is set, it takes the next response and does not return."""

    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[list[list[int]], bool]] = queue.Queue()
        self.free = threading.Event()
        self.free.set()
        self.broken = False

    def send(self, tensors: Mapping[str, npt.NDArray[Any]], *, final: bool) -> None:
        if self.broken:
            raise OSError("no memory")
        rows = tensors["output_ids"] if tensors else np.zeros((1, 0, 2), np.int32)
        assert rows.dtype == np.int32
        self.sent.put((rows[0].tolist(), final))
        assert self.free.wait(GENEROUS)

    def fail(self, error: str) -> None:
        raise AssertionError(error)

    def abandoned(self) -> bool:
        return False


Ask = Callable[..., RecordingSender]


@pytest.fixture
def carried() -> tuple[PlayedExecutor, EngineService, CarrierSender, Ask]:
    """An engine with a carrier "c", and a way to ask for one more answer on it."""
    executor, sender = PlayedExecutor(), CarrierSender()
    service = EngineService(executor, Limits(5, 8), BYTES, exclude_input=True)  # type: ignore[arg-type]
    service.handle("carrier", generation(), sender, extensions=json.dumps({"carry": "c"}))

    def ask(number: int, name: str = "c", **inputs: Any) -> RecordingSender:
        own = RecordingSender()
        extensions = json.dumps({"carrier": [name, number]})
        service.handle(f"r{number}", generation(**({"streaming": True} | inputs)), own, extensions=extensions)
        return own

    return executor, service, sender, ask


Carried = tuple[PlayedExecutor, EngineService, CarrierSender, Ask]


def test_tokens_come_on_the_carrier_and_the_end_on_the_answers_own_stream(carried: Carried) -> None:
    executor, _, sender, ask = carried
    own = ask(7)
    executor.answer(0, 2)  # half a character: whoever reads tokens decodes them
    assert sender.sent.get(timeout=GENEROUS) == ([[7, 2]], False)
    executor.answer(0, 3, end=FinishReason.LENGTH)
    assert own.sent == [([3], None, True)]
    assert own.tensors[0]["sequence_length"].tolist() == [[2]]


def test_tokens_that_wait_share_a_response(carried: Carried) -> None:
    executor, _, sender, ask = carried
    ask(1), ask(2)
    sender.free.clear()
    executor.answer(0, 0)
    assert sender.sent.get(timeout=GENEROUS) == ([[1, 0]], False)
    for row, token_id in ((1, 1), (0, 4), (1, 0)):
        executor.answer(row, token_id)
    sender.free.set()
    assert sender.sent.get(timeout=GENEROUS) == ([[2, 1], [1, 4], [2, 0]], False)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        pytest.param("another", {}, id="the carrier of another engine instance"),
        pytest.param("c", {"return_log_probs": True}, id="more than tokens"),
        pytest.param("c", {"num_return_sequences": 2}, id="two sequences"),
    ],
)
def test_other_answers_come_on_their_own_stream(carried: Carried, name: str, inputs: dict[str, Any]) -> None:
    executor, _, sender, ask = carried
    own = ask(7, name, **inputs)
    executor.answer(0, 1)
    executor.answer(0, 4)
    assert [ids for ids, _, _ in own.sent] == [[1], [4]]
    assert own.tensors[0]["sequence_length"].tolist() == [[1]]
    assert sender.sent.empty()


@pytest.mark.parametrize("end", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_an_answer_that_ends_early_ends_on_its_own_stream(carried: Carried, end: FinishReason) -> None:
    executor, _, sender, ask = carried
    own = ask(7)
    executor.answer(0, 1)
    assert sender.sent.get(timeout=GENEROUS) == ([[7, 1]], False)
    executor.answer(0, end=end, error="broken" if end is FinishReason.ERROR else None)
    assert own.sent[0] == ("broken" if end is FinishReason.ERROR else ([], None, True))


def test_a_carrier_that_breaks_fails_its_answers(carried: Carried) -> None:
    executor, _, sender, ask = carried
    own = ask(7)
    sender.broken = True
    executor.answer(0, 1)

    def failed() -> bool:
        if not own.sent:
            executor.answer(0, 1)
        return bool(own.sent)

    assert wait_for(failed)
    assert own.sent == ["the answer could not be sent: its carrier failed: no memory"]
    assert set(executor.cancelled) == {executor.requests[0].id}


def test_a_carrier_ends_some_time_after_its_last_answer(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, service, sender, ask = carried
    monkeypatch.setattr(carrier, "_IDLE_SECONDS", 0.0)
    first, second = ask(1), ask(2)
    executor.answer(0, 1, end=FinishReason.LENGTH)
    service.cancel_abandoned()
    executor.answer(1, 1)
    assert sender.sent.get(timeout=GENEROUS) == ([[2, 1]], False)
    executor.answer(1, 4, end=FinishReason.LENGTH)
    service.cancel_abandoned()
    assert sender.sent.get(timeout=GENEROUS) == ([], True)
    assert (first.ended, second.ended) == (True, True)
    late = ask(3)
    executor.answer(2, 4)
    assert late.sent == [([4], None, False)]


def test_a_name_is_taken_once(carried: Carried) -> None:
    _, service, _, _ = carried
    other = RecordingSender()
    service.handle("carrier", generation(), other, extensions=json.dumps({"carry": "c"}))
    assert other.sent == ["carrier 'c' is open already; use a new name"]


def test_clients_are_looked_for_less_often_if_they_are_many() -> None:
    """Each look is a message to Triton and back."""
    executor, looks = PlayedExecutor(), [0]
    service = EngineService(executor, Limits(5, 8), BYTES, exclude_input=True)  # type: ignore[arg-type]

    class Counting(RecordingSender):
        def abandoned(self) -> bool:
            looks[0] += 1
            return super().abandoned()

    senders = [Counting() for _ in range(250)]
    for sender in senders:
        service.handle("", generation(), sender)
    for _ in range(30):
        service.cancel_abandoned()
    assert looks == [30 * 25]
    for left in (9, 240):
        senders[left].gone = True
        for _ in range(11):
            service.cancel_abandoned()
        assert executor.cancelled[-1] == executor.requests[left].id


def test_a_stop_request_with_a_place_stops_the_answer_there_alone(carried: Carried) -> None:
    executor, service, _, ask = carried
    ask(1), ask(2)
    stopping = [RecordingSender() for _ in range(3)]
    for place, sender in zip((["c", 2], ["c", 3], ["another", 1]), stopping, strict=True):
        service.handle("", generation(stop=True), sender, extensions=json.dumps({"carrier": place}))
    assert executor.cancelled == [executor.requests[1].id]
    assert [sender.sent for sender in stopping] == [[(None, None, True)]] * 3
