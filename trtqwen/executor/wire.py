"""The format of events from rank 0 to the client: one frame for each step.

A frame is its kind (1 byte), the length of its content (4 bytes, little endian) and the content. Most tokens travel
in a TOKENS frame of three int32 each: the request's number, the token id, and why the request ended. Everything else
is a JSON frame, a list of events. A NAMES frame tells the numbers of requests before they are used.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator

from pydantic import TypeAdapter

from trtqwen.executor.request import Event, FinishReason, Response, TopLogProbs
from trtqwen.executor.sequence import Generated

_HEADER = 5
_TOKENS, _JSON, _NAMES = b"T", b"J", b"N"
_NO_TOKEN = -1
_REASONS = (None, *(reason for reason in FinishReason if reason is not FinishReason.ERROR))
_EVENTS = TypeAdapter(list[Event])


class EventEncoder:
    """Turns events into frames; one for each stream."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._next = 0

    def encode(self, events: Iterable[Event | Generated]) -> bytes:
        """The frames of some events and tokens, in their order."""
        frames: list[bytes] = []
        tokens, others, names = array("i"), list[Event](), dict[int, str]()

        def close() -> None:
            if names:
                frames.append(_frame(_NAMES, json.dumps(list(names.items())).encode()))
            if tokens:
                frames.append(_frame(_TOKENS, tokens.tobytes()))
            if others:
                frames.append(_frame(_JSON, _EVENTS.dump_json(others, exclude_defaults=True)))
            del tokens[:], others[:]
            names.clear()

        for event in events:
            if isinstance(event, Generated):
                if others:
                    close()
                sequence, token_id, reason = event
                name = sequence.request.id
                number = self._numbers.get(name)
                if number is None:
                    number = self._number(name, names)
                tokens.extend((number, _NO_TOKEN if token_id is None else token_id, _REASONS.index(reason)))
                if reason is not None:
                    del self._numbers[name]
                continue
            response = event.response
            if response is not None and _is_plain(response):
                if others:
                    close()
                token = response.token_ids[0] if response.token_ids else _NO_TOKEN
                number = self._number(response.request_id, names)
                tokens.extend((number, token, _REASONS.index(response.finish_reason)))
            else:
                if tokens:
                    close()
                others.append(event)
            if response is not None and response.finish_reason is not None:
                self._numbers.pop(response.request_id, None)
        close()
        return b"".join(frames)

    def _number(self, request_id: str, names: dict[int, str]) -> int:
        number = self._numbers.get(request_id)
        if number is None:
            self._numbers[request_id] = number = self._next
            self._next = (self._next + 1) % (1 << 31)
            names[number] = request_id
        return number


class EventDecoder:
    """Turns what `EventEncoder` made back into events, however the bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._names: dict[int, str] = {}

    def decode(self, data: bytes) -> Iterator[Event | Response]:
        """Return the complete events in order; responses without an event around them."""
        data, at = self._rest + data, 0
        while len(data) - at >= _HEADER:
            end = at + _HEADER + int.from_bytes(data[at + 1 : at + _HEADER], "little")
            if end > len(data):
                break
            kind, content = data[at : at + 1], data[at + _HEADER : end]
            at = end
            if kind == _TOKENS:
                yield from self._responses(content)
            elif kind == _NAMES:
                self._names.update(json.loads(content))
            else:
                yield from self._events(content)
        self._rest = data[at:]

    def _responses(self, content: bytes) -> Iterator[Response]:
        numbers = iter(array("i", content))
        for number, token, reason in zip(numbers, numbers, numbers, strict=True):
            name = self._names.pop(number) if reason else self._names[number]
            token_ids = () if token == _NO_TOKEN else (token,)
            yield Response(request_id=name, token_ids=token_ids, finish_reason=_REASONS[reason])

    def _events(self, content: bytes) -> Iterator[Event | Response]:
        for event in _EVENTS.validate_json(content):
            response = event.response
            if response is not None and response.finish_reason is not None:
                self._names = {n: name for n, name in self._names.items() if name != response.request_id}
            yield event if response is None else response


def merged(responses: Iterable[Response]) -> list[Response]:
    """Responses with neighbors of one request joined, so that a reader that is late gets fewer and longer ones."""
    latest: dict[str, Response] = {}
    done: list[Response] = []
    for response in responses:
        before = latest.pop(response.request_id, None)
        if before is not None:
            if response.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                done.append(before)
            else:
                response = _joined(before, response)
        if response.finish_reason is None:
            latest[response.request_id] = response
        else:
            done.append(response)
    return [*done, *latest.values()]


def _joined(first: Response, second: Response) -> Response:
    logits = (first.generation_logits or b"") + (second.generation_logits or b"")
    return Response(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        log_probs=first.log_probs + second.log_probs,
        context_logits=first.context_logits or second.context_logits,
        generation_logits=logits or None,
        top_log_probs=_joined_tops(first.top_log_probs, second.top_log_probs),
        prompt_log_probs=first.prompt_log_probs or second.prompt_log_probs,
        perf_metrics=second.perf_metrics,
        finish_reason=second.finish_reason,
        error=second.error,
    )


def _joined_tops(first: TopLogProbs | None, second: TopLogProbs | None) -> TopLogProbs | None:
    if first is None or second is None:
        return first or second
    return TopLogProbs(ids=first.ids + second.ids, log_probs=first.log_probs + second.log_probs)


def _is_plain(response: Response) -> bool:
    """Return whether three integers describe the response."""
    return (
        len(response.token_ids) <= 1
        and not response.log_probs
        and response.context_logits is None
        and response.generation_logits is None
        and response.top_log_probs is None
        and response.prompt_log_probs is None
        and response.perf_metrics is None
        and response.error is None
        and response.finish_reason in _REASONS
    )


def _frame(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(_HEADER - 1, "little") + content
