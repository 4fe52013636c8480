"""Parts that need no server: templates, sampling, rates, errors, replies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from tritonclient.grpc import service_pb2

from tests.gateway.conftest import TOOLS_TEMPLATE
from tests.models import their_tokenizer
from trtqwen.diagnostics import InputError
from trtqwen.gateway.admission.admission import Capacity, QueueLimits
from trtqwen.gateway.admission.auth import Caller, TokenBucket, read_keys
from trtqwen.gateway.api.response_format import plan_guide
from trtqwen.gateway.api.sampling import sampling_values
from trtqwen.gateway.api.schemas import ChatRequest, CompletionRequest
from trtqwen.gateway.app import create_app
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig, gateway_config
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.guide import ANY_OBJECT, Guide
from trtqwen.gateway.generation.inputs import Sampling, engine_inputs
from trtqwen.gateway.generation.plan import fit_answer
from trtqwen.gateway.generation.upstream import _reply
from trtqwen.gateway.model import ServedModel, load_model
from trtqwen.gateway.state import Runtime, plan_gate
from trtqwen.hf import chat_template as hf
from trtqwen.hf.generation import GenerationDefaults

TOOL = {"type": "function", "function": {"name": "f", "description": "<b>é & 'q'", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"stadt": "Köln <&>"}}}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    ([{"role": "user", "content": "hi <|im_end|> {{x}}"}], []),
    ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], [TOOL]),
    (
        [
            {"role": "user", "content": "天气？"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        [TOOL, TOOL],
    ),
]


@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS)
def test_templates_render_as_in_transformers(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    reference = their_tokenizer()
    for text in (TOOLS_TEMPLATE, reference.chat_template):
        wanted = reference.apply_chat_template(
            messages, tools=tools or None, chat_template=text, tokenize=False, add_generation_prompt=True
        )
        assert ChatTemplate(hf.ChatTemplate({"default": text})).render(messages, tools) == wanted


def test_broken_templates_and_refusals_are_errors() -> None:
    template = ChatTemplate(hf.ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}))
    with pytest.raises(ApiError, match="refuses these messages: roles must alternate") as caught:
        template.render([], [])
    assert caught.value.status == 400


loaded = cache(load_model)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


QWEN = GenerationDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


@pytest.mark.parametrize(
    ("defaults", "fields", "wanted"),
    [
        (QWEN, {}, {"temperature": 0.7, "runtime_top_p": 0.8, "runtime_top_k": 20, "repetition_penalty": 1.05}),
        (QWEN, {"temperature": 0}, {"runtime_top_k": 1, "repetition_penalty": 1.05}),
        (QWEN, {"top_p": 0, "repetition_penalty": 1}, {"runtime_top_k": 1}),
        (QWEN, {"top_p": 1e-50}, {"runtime_top_k": 1, "repetition_penalty": 1.05}),
        (QWEN, {"top_k": 0, "top_p": 1, "temperature": 1, "repetition_penalty": 1},
         {"temperature": 1, "runtime_top_p": 1}),
        (GenerationDefaults(), {}, {"temperature": 1, "runtime_top_p": 1}),
        (GenerationDefaults(do_sample=False), {}, {"runtime_top_k": 1}),
        (GenerationDefaults(do_sample=False), {"temperature": 0.5}, {"temperature": 0.5, "runtime_top_p": 1}),
        (GenerationDefaults(), {"presence_penalty": 1, "frequency_penalty": -1, "min_tokens": 3, "temperature": 0},
         {"presence_penalty": 1, "frequency_penalty": -1, "min_tokens": 3, "runtime_top_k": 1}),
    ],
)  # fmt: skip
def test_what_is_left_open_is_the_model_s_default(
    defaults: GenerationDefaults, fields: dict[str, Any], wanted: dict[str, float]
) -> None:
    assert sampling_values(chat(**fields), defaults) == wanted


def test_no_request_waits_for_tables_of_the_vocabulary(engine_repository: Path) -> None:
    async def served() -> ServedModel:
        app = create_app(GatewayConfig(repository=engine_repository, triton=("127.0.0.1:9",)))
        async with app.router.lifespan_context(app):
            runtime: Runtime = app.state.fleet.default.stable.engine.runtime
        return runtime.model

    made = vars(asyncio.run(served()).tokenizer)
    assert {"token_bytes", "special_pattern", "_plain_backend"} <= made.keys()


def test_tensors_go_by_the_release_s_own_names(engine_repository: Path) -> None:
    model = load_model(engine_repository)
    sampling = Sampling({"min_tokens": 2, "temperature": 0.5}, seed=-1, guide=Guide('{"é": 1}'))
    tensors = engine_inputs(model, sampling, (1, 2, 3), 7, index=1)
    assert tensors["seed"].dtype == np.uint64
    assert tensors["seed"].item() == 0  # -1 counts as 2**64 - 1, and the second answer has the next one
    assert tensors["min_tokens"].tolist() == [[2]]
    assert tensors["input_ids"].tolist() == [[1, 2, 3]]
    assert tensors["guided_decoding_guide"].item() == '{"é": 1}'.encode()
    assert tensors["end_id"].item() == model.tokenizer.end_id
    renamed = {"seed": "random_seed", "min_tokens": "min_length"}
    older = replace(model, tensors=frozenset(renamed.get(name, name) for name in model.tensors))
    assert set(engine_inputs(older, sampling, (1,), 7, 0)) == {renamed.get(name, name) for name in tensors}
    oldest = replace(model, tensors=model.tensors - {"guided_decoding_guide", "guided_decoding_guide_type"})
    with pytest.raises(ApiError, match="guided_decoding_guide_type is not served by the engine"):
        engine_inputs(oldest, sampling, (1,), 7, 0)


def test_the_model_is_as_its_repository_says(engine_repository: Path, stand_in_repository: Path) -> None:
    model = load_model(engine_repository)
    assert (model.name, model.limits.max_batch_size, model.limits.max_seq_len) == ("repository", 16, 512)
    assert model.defaults == GenerationDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert model.guided_decoding
    assert load_model(stand_in_repository).guided_decoding


def test_four_copies_behind_one_triton_run_four_times_as_much(
    trt_repository: Callable[..., Path], engine_repository: Path
) -> None:
    """Orchestrator mode: one address, a batch and a KV cache for each copy; a request lives in one of them."""
    one = plan_gate(GatewayConfig(repository=engine_repository), load_model(engine_repository))
    path = trt_repository(1, 4, "orchestrator")
    four = plan_gate(GatewayConfig(repository=path), load_model(path))
    assert four.capacity == Capacity(4 * one.capacity.requests, 4 * one.capacity.tokens)
    assert four.queue == one.queue == QueueLimits(1024, 1 << 21)
    assert load_model(path).cache_tokens(None) == load_model(engine_repository).cache_tokens(None) == 16 * 512


@given(
    st.integers(1, 600),
    st.none() | st.integers(1, 600),
    st.none() | st.integers(1, 600),
    st.none() | st.integers(1, 600),
    st.none() | st.integers(1, 600),
)
def test_an_answer_always_fits(
    engine_repository: Path, prompt: int, asked: int | None, default: int | None, most: int | None, cache: int | None
) -> None:
    model = loaded(engine_repository)
    config = GatewayConfig(
        repository=engine_repository, default_max_tokens=default, max_tokens=most, kv_cache_tokens=cache
    )
    limit = min(512, cache or 512)
    try:
        granted = fit_answer(model, config, prompt, asked)
    except ApiError as problem:
        too_long = "context_length_exceeded" if limit == 512 else "kv_cache_exceeded"
        assert problem.code in (too_long, "invalid_value")  # noqa: PT017
        assert prompt >= limit or (asked or 0) > min(limit - prompt, most or limit)
    else:
        assert 1 <= granted.reserved <= granted.max_tokens <= limit - prompt
        assert granted.max_tokens <= (most or limit)
        assert asked is None or granted.reserved == granted.max_tokens == asked


@given(st.integers(1, 100), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=30))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: int, asks: list[tuple[float, int]]) -> None:
    now, given_out, bucket = 0.0, 0, TokenBucket(per_minute, 0.0)
    for pause, amount in asks:
        now += pause
        wait = bucket.wait(amount, now)
        assert (wait == math.inf) == (amount > per_minute)
        if wait == 0:
            bucket.take(amount)
            given_out += amount
        elif wait < math.inf:
            assert bucket.wait(amount, now + wait * 1.001 + 1e-6) == 0  # as promised
            now += wait * 1.001 + 1e-6
        assert given_out <= per_minute * (1 + now / 60) + 1e-6


def test_a_refused_request_takes_nothing() -> None:
    caller = Caller("c", requests=TokenBucket(1, 0.0), tokens=TokenBucket(10, 0.0))
    for _ in range(3):
        with pytest.raises(ApiError, match="more than the key's rate"):
            caller.charge_tokens(11, 0.0)
    caller.charge_tokens(10, 0.0)


def test_what_is_refunded_can_be_taken_again_but_no_more() -> None:
    caller = Caller("c", tokens=TokenBucket(10, 0.0))
    caller.charge_tokens(10, 0.0)
    caller.refund_tokens(10)
    caller.charge_tokens(10, 0.0)
    caller.refund_tokens(50)
    caller.charge_tokens(10, 0.0)
    with pytest.raises(ApiError, match="used up"):
        caller.charge_tokens(1, 0.0)
    Caller("free").refund_tokens(5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [", "is not YAML"),
        ("- a", "keys"),
        ("keys: []", "at least 1 item"),
        ("keys: [{name: a, key: short}]", "at least 16 characters"),
        ("keys: [{name: a, key: 0123456789abcdef, rate: 3}]", "keys.0.rate"),
        ("keys: [{name: a, key: 0123456789 abcdef}]", "keys.0.key"),
        ("keys: [{name: a, key: 0123456789abcdéf}]", "keys.0.key"),
        ("keys: [{name: a, key: 0123456789abcdef}, {name: b, key: 0123456789abcdef}]", "b has the same key as a"),
    ],
)
def test_keys_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_keys(tmp_path / "keys.yaml")
    assert "0123456789" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none.yaml")


MISTAKES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [None] * 9**5}),
    (CompletionRequest, {"prompt": [1, *[None] * 9**5]}),
    (CompletionRequest, {"prompt": [[1], *[[None]] * 9**5]}),
    (ChatRequest, {"messages": [5] * 9**5}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 9**5}]}),
    (ChatRequest, {"messages": [], "tools": [{}] * 9**5}),
    (ChatRequest, {"messages": [], "stop": [None] * 9**5}),
    (ChatRequest, {"messages": [], "logit_bias": {f"a{number}": 1 for number in range(9**5)}}),
    (ChatRequest, {"messages": [], **{f"a{number}": 1 for number in range(9**5)}}),
]


@pytest.mark.parametrize(("schema", "body"), MISTAKES)
def test_of_many_mistakes_the_first_few_are_told(schema: type[BaseModel], body: dict[str, Any]) -> None:
    """Each has a message that repeats part of the body: all of them would take gigabytes."""
    with pytest.raises(ValidationError) as caught:
        schema.model_validate({"model": "m", **body})
    assert caught.value.error_count() < 10


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gateway: field 'port': .* 65535 \(got 70000\)"):
        gateway_config(repository=tmp_path, port=70000)
    with pytest.raises(InputError, match=r"triton.0: 'http://localhost:1' is not host:port; write it like 127"):
        gateway_config(repository=tmp_path, triton=("http://localhost:1",))
    with pytest.raises(InputError, match="can be reached by others"):
        gateway_config(repository=tmp_path, host="0.0.0.0")
    assert gateway_config(repository=tmp_path, host="0.0.0.0", allow_anonymous=True).host == "0.0.0.0"


def test_a_file_of_settings_adds_to_those_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("queue_seconds: 5\nmax_tokens: 100\napi_keys: keys.yaml\n")
    config = gateway_config(file, repository=tmp_path, port=1, api_keys=None)
    assert (config.queue_seconds, config.max_tokens, config.port) == (5, 100, 1)
    assert config.api_keys == tmp_path / "keys.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue_second: 5", "field 'queue_second' is unknown"),
        ("queue_seconds: 0", "field 'queue_seconds': .* greater than 0"),
        ("port: 5", "port: is also set by the command"),
        ("[1]", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("\udcff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_settings_is_checked(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "gateway.yaml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"gateway\.yaml: {message}"):
        gateway_config(file, repository=tmp_path, port=80)


@pytest.mark.parametrize("repeats", [True, False])
def test_log_probs_are_those_of_the_new_tokens(repeats: bool) -> None:
    response = service_pb2.ModelInferResponse()
    for name, values in (
        ("output_ids", np.array([7, 8], np.int32)),
        ("output_log_probs", np.array(([-1, -2] if repeats else []) + [-3, -4], np.float32)),
    ):
        response.outputs.add(name=name, shape=[1, 1, len(values)])
        response.raw_output_contents.append(values.tobytes())
    reply = _reply(response, received=2)
    assert (reply.token_ids, reply.log_probs) == ((7, 8), (-3.0, -4.0))


@pytest.mark.parametrize("answer", ['{"a": 1}', "[]", '"text"', "1", "{", "", "NaN", "[" * 100_000])
def test_any_object_is_an_object(answer: str) -> None:
    assert ANY_OBJECT.allows(answer) == (answer == '{"a": 1}')


def test_without_guided_decoding_a_response_format_is_refused() -> None:
    unguided = cast(ServedModel, SimpleNamespace(guided_decoding=False))
    with pytest.raises(ApiError, match="needs guided decoding") as caught:
        plan_guide(unguided, chat(response_format={"type": "json_object"}))
    assert (caught.value.status, caught.value.code) == (400, "unsupported")
    assert plan_guide(unguided, chat(response_format={"type": "text"})) is None
