"""Events cross from process to process whole and in order, however the pipe cuts them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.executor.request import (
    Event,
    FinishReason,
    IterationStats,
    PerfMetrics,
    PromptLogProbs,
    Response,
    TopLogProbs,
)
from trtqwen.executor.wire import EventDecoder, EventEncoder, merged

METRICS = PerfMetrics(**dict.fromkeys(PerfMetrics.model_fields, 7))
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=2).map(tuple)
responses = st.builds(
    Response,
    request_id=st.sampled_from(["1", "two", "三"]),
    token_ids=tokens,
    log_probs=st.sampled_from([(), (-0.5,)]),
    generation_logits=st.sampled_from([None, b"\x00\xff"]),
    perf_metrics=st.sampled_from([None, METRICS]),
    finish_reason=st.sampled_from([None, None, None, *FinishReason]),
    error=st.sampled_from([None, "it broke"]),
)
events = st.one_of(
    responses.map(lambda response: Event(response=response)),
    st.just(Event(stats=IterationStats(iterations=3))),
    st.just(Event(ready=True)),
)


def inside(event: Event) -> Event | Response:
    return event if event.response is None else event.response


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(events, max_size=6), max_size=6), st.integers(1, 50))
def test_what_is_encoded_is_decoded(batches: list[list[Event]], cut: int) -> None:
    encoder, decoder = EventEncoder(), EventDecoder()
    data = b"".join(map(encoder.encode, batches))
    decoded = [item for at in range(0, len(data), cut) for item in decoder.decode(data[at : at + cut])]
    assert decoded == [inside(event) for batch in batches for event in batch]


def test_what_has_ended_is_forgotten() -> None:
    encoder, decoder = EventEncoder(), EventDecoder()
    for number in range(100):
        for reason in (None, FinishReason.ERROR if number % 2 else FinishReason.LENGTH):
            response = Response(request_id=str(number), token_ids=(number,), finish_reason=reason)
            assert list(decoder.decode(encoder.encode([Event(response=response)]))) == [response]
    assert not encoder._numbers
    assert not decoder._names


def test_a_step_is_a_few_bytes_a_token() -> None:
    encoder = EventEncoder()
    step = [Event(response=Response(request_id=str(number), token_ids=(number,))) for number in range(64)]
    encoder.encode(step)
    assert len(encoder.encode(step)) == 5 + 64 * 12


def test_waiting_tokens_of_a_request_become_one_response() -> None:
    def token(name: str, token_id: int, **more: object) -> Response:
        return Response(request_id=name, token_ids=(token_id,), log_probs=(-float(token_id),), **more)  # type: ignore[arg-type]

    joined = merged([token("a", 1), token("b", 9), token("a", 2), token("a", 3, finish_reason="length")])
    assert {response.request_id: response.token_ids for response in joined} == {"a": (1, 2, 3), "b": (9,)}
    [a] = [response for response in joined if response.request_id == "a"]
    assert a.log_probs == (-1.0, -2.0, -3.0)
    assert a.finish_reason is FinishReason.LENGTH


def test_an_error_does_not_swallow_the_tokens_before_it() -> None:
    error = Response(request_id="a", finish_reason=FinishReason.ERROR, error="it broke")
    assert merged([Response(request_id="a", token_ids=(1,)), error]) == [
        Response(request_id="a", token_ids=(1,)),
        error,
    ]


def test_joined_responses_keep_every_log_probability() -> None:
    def ranked(byte: bytes) -> TopLogProbs:
        return TopLogProbs(ids=byte * 8, log_probs=byte * 8)

    prompt = PromptLogProbs(log_probs=b"1234", top=None)
    first = Response(
        request_id="a", token_ids=(1,), log_probs=(-1.0,), top_log_probs=ranked(b"a"), prompt_log_probs=prompt
    )
    second = Response(request_id="a", token_ids=(2,), log_probs=(-2.0,), top_log_probs=ranked(b"b"))
    [joined] = merged([first, second])
    assert joined.top_log_probs == TopLogProbs(ids=b"a" * 8 + b"b" * 8, log_probs=b"a" * 8 + b"b" * 8)
    assert joined.prompt_log_probs == prompt
    ranked_only = first.model_copy(update={"log_probs": ()})
    assert list(EventDecoder().decode(EventEncoder().encode([Event(response=ranked_only)]))) == [ranked_only]
