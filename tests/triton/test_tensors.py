"""Request tensors to executor requests, and what the embedded engine refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import GuidedDecodingParams, OutputConfig, PerfMetrics, Request, SamplingConfig
from trtqwen.triton.tensors import Generation, Limits, Part, Place, read_generation, write_part
from trtqwen.triton.words import pack_words, unpack_words

UPSTREAM = json.loads(Path(__file__).with_name("data").joinpath("upstream.json").read_text("utf-8"))["models"]
TIMES = ("arrival", "first_scheduled", "first_token", "last_token")
DTYPES = {
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_UINT8": np.uint8,
    "TYPE_BOOL": np.bool_,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_STRING": np.object_,
}


def inputs(**tensors: Any) -> dict[str, npt.NDArray[Any]]:
    """One row, as the backend sees it: `input_ids` [1, 3], scalars [1]."""
    request = {
        "input_ids": np.array([[5, 6, 7]], np.int32),
        "input_lengths": np.array([3], np.int32),
        "request_output_len": np.array([9], np.int32),
    }
    return request | {name: np.asarray(value) for name, value in tensors.items()}


def read(tensors: dict[str, npt.NDArray[Any]]) -> Generation:
    return read_generation(tensors, map(str, itertools.count()), Limits(vocab_size=10, max_batch_size=4))


def test_every_sampling_tensor_arrives() -> None:
    [request] = read(
        inputs(
            runtime_top_k=np.array([4], np.int32),
            runtime_top_p=np.array([0.5], np.float32),
            temperature=np.array([0.25], np.float32),
            seed=np.array([2**64 - 1], np.uint64),
            repetition_penalty=np.array([1.5], np.float32),
            presence_penalty=np.array([0.75], np.float32),
            frequency_penalty=np.array([-0.5], np.float32),
            min_tokens=np.array([2], np.int32),
            end_id=np.array([1], np.int32),
            stop_words_list=pack_words([((8, 9), (3,))]),
            bad_words_list=pack_words([((4,), (5, 6))]),
            embedding_bias=np.array([[0, 1.5, 0, -np.inf, 0, 0, 0, 0, 0, 0]], np.float32),
            return_log_probs=[True],
            return_context_logits=[True],
            return_generation_logits=[True],
            return_perf_metrics=[True],
            guided_decoding_guide_type=np.array([[b"regex"]], np.object_),
            guided_decoding_guide=np.array([[b"[0-9]+"]], np.object_),
        )
    ).requests
    sampling = SamplingConfig(
        top_k=4,
        top_p=0.5,
        temperature=0.25,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=0.75,
        frequency_penalty=-0.5,
        min_tokens=2,
    )
    assert request == Request(
        id="0",
        input_token_ids=(5, 6, 7),
        max_tokens=9,
        end_id=1,
        stop_words=((8, 9), (3,)),
        bad_words=((4,), (5, 6)),
        embedding_bias={1: 1.5, 3: -np.inf},
        sampling=sampling,
        output=OutputConfig(
            return_log_probs=True,
            return_context_logits=True,
            return_generation_logits=True,
            return_perf_metrics=True,
        ),
        guided_decoding=GuidedDecodingParams(guide_type="regex", guide="[0-9]+"),
    )


def test_the_names_before_1_0_mean_the_same() -> None:
    [old] = read(
        inputs(
            min_length=np.array([2], np.int32),
            random_seed=np.array([7], np.uint64),
            return_kv_cache_reuse_stats=[True],
        )
    ).requests
    [new] = read(
        inputs(min_tokens=np.array([2], np.int32), seed=np.array([7], np.uint64), return_perf_metrics=[True])
    ).requests
    assert old == new
    assert (new.sampling.min_tokens, new.sampling.seed, new.output.return_perf_metrics) == (2, 7, True)


def test_return_sequences_are_requests_with_seeds_of_their_own() -> None:
    generation = read(
        {
            "input_ids": np.array([[1], [2]], np.int32),
            "input_lengths": np.array([1, 1], np.int32),
            "request_output_len": np.array([3, 3], np.int32),
            "num_return_sequences": np.array([2, 1], np.int32),
            "seed": np.array([2**64 - 1, 5], np.uint64),
        }
    )
    assert generation.places == (Place(0, 0), Place(0, 1), Place(1, 0))
    assert [request.input_token_ids for request in generation.requests] == [(1,), (1,), (2,)]
    assert [request.sampling.seed for request in generation.requests] == [2**64 - 1, 0, 5]
    written = write_part(generation, 1, Part([9], 1, [], 0.0))
    assert (written["batch_index"].item(), written["sequence_index"].item()) == (0, 1)


def test_defaults_are_upstreams() -> None:
    generation = read(inputs(end_id=[-1], runtime_top_p=np.array([-1], np.float32)))
    assert generation.requests == (Request(id="0", input_token_ids=(5, 6, 7), max_tokens=9),)
    assert generation.requests[0].sampling.greedy
    assert not generation.streaming
    assert generation.exclude_input is None


def test_each_row_is_a_request_of_its_own_length() -> None:
    generation = read(
        {
            "input_ids": np.array([[1, 2, 3], [4, 0, 0]], np.int32),
            "input_lengths": np.array([3, 1], np.int32),
            "request_output_len": np.array([5, 6], np.int32),
            "temperature": np.array([0.5, 2.0], np.float32),
            "stop_words_list": pack_words([((7,),), ()]),
        }
    )
    assert [request.input_token_ids for request in generation.requests] == [(1, 2, 3), (4,)]
    assert [request.max_tokens for request in generation.requests] == [5, 6]
    assert [request.sampling.temperature for request in generation.requests] == [0.5, 2.0]
    assert [request.stop_words for request in generation.requests] == [((7,),), ()]


SERVED = {
    *("bad_words_list", "embedding_bias", "num_return_sequences", "return_log_probs", "return_context_logits"),
    *("return_generation_logits", "return_perf_metrics", "guided_decoding_guide_type", "guided_decoding_guide"),
    *("input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "stop_words_list", "streaming", "stop"),
    *("temperature", "runtime_top_k", "runtime_top_p", "seed", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_tokens", "exclude_input_in_output", "decoder_input_ids"),
    *("return_num_input_tokens", "return_num_output_tokens"),
}
NOT_SERVED = [tensor for tensor in UPSTREAM["tensorrt_llm"]["inputs"] if tensor["name"] not in SERVED]


@pytest.mark.parametrize("tensor", NOT_SERVED, ids=lambda tensor: tensor["name"])
def test_what_is_not_served_is_refused_by_name_unless_neutral(tensor: dict[str, Any]) -> None:
    dtype = DTYPES.get(tensor["data_type"], np.float16)
    asking = b"x" if dtype is np.object_ else 1 if dtype is np.bool_ else 3
    value = np.full([1, *(2 for _ in tensor["dims"])], asking, dtype)
    with pytest.raises(RequestError, match=rf"^{tensor['name']}: is (not supported|for beam search)"):
        read(inputs(**{tensor["name"]: value}))
    neutral = np.full_like(value, b"" if dtype is np.object_ else 0)
    read(inputs(**{tensor["name"]: neutral}))
    read(inputs(**{tensor["name"]: value[..., :0]}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_lengths", [4], "input_lengths: 4 is not between 1 and the 3 ids"),
        ("input_lengths", [0], "input_lengths: 0 is not between"),
        ("input_ids", [[-1, 2, 3]], r"input_ids: .*greater than or equal to 0 \(got -1\)"),
        ("request_output_len", [0], r"request_output_len: .*greater than 0 \(got 0\)"),
        ("temperature", [-1.0], r"temperature: .*\(got -1.0\)"),
        ("runtime_top_k", [-2], r"runtime_top_k: .*\(got -2\)"),
        ("runtime_top_p", [1.5], r"runtime_top_p: .*\(got 1.5\)"),
        ("repetition_penalty", [0.0], r"repetition_penalty: .*\(got 0.0\)"),
        ("presence_penalty", [float("nan")], r"presence_penalty: .*finite"),
        ("stop_words_list", [[[1, 2], [2, 1]]], "stop_words_list: end offset 1 is out of order"),
        ("stop_words_list", [[[1, 2], [3, -1]]], "stop_words_list: end offset 3 is out of order"),
        ("bad_words_list", [[[-1, 2], [2, -1]]], r"bad_words_list: .*greater than or equal to 0 \(got -1\)"),
        ("embedding_bias", [[0.5, 1]], "embedding_bias: has 2 values, but the model's vocabulary, .*, has 10"),
        ("embedding_bias", [[np.nan] + [0] * 9], "embedding_bias: .*finite"),
        ("num_return_sequences", [5], "num_return_sequences: 5 is not between 1 and the engine's max_batch_size 4"),
        ("num_return_sequences", [-1], "num_return_sequences: -1 is not between"),
        ("guided_decoding_guide_type", np.array([[b"xml"]], np.object_), "is 'xml'; send one of json, json_schema"),
        ("guided_decoding_guide_type", np.array([[b"regex"]], np.object_), "guided_decoding_guide: is missing for"),
        (
            "guided_decoding_guide",
            np.array([[b"a"]], np.object_),
            "guided_decoding_guide_type: is missing, but there is",
        ),
        ("guided_decoding_guide", np.array([[b"\xff"]], np.object_), "guided_decoding_guide: byte 0 is not UTF-8"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(inputs(**{name: value}))


def test_a_missing_tensor_is_named() -> None:
    tensors = inputs()
    del tensors["input_ids"]
    with pytest.raises(RequestError, match="input_ids: is missing"):
        read(tensors)


def test_words_survive_packing() -> None:
    rows = [((1, 2), (3,)), (), ((4,),)]
    packed = pack_words(rows)
    assert packed.tolist()[0] == [[1, 2, 3], [2, 3, -1]]
    assert [unpack_words("w", row) for row in packed] == rows
    assert pack_words([(), ()]).shape == (2, 2, 0)


def test_outputs_have_upstreams_shapes() -> None:
    asked = (
        "num_input_tokens",
        "num_output_tokens",
        "log_probs",
        "context_logits",
        "generation_logits",
        "perf_metrics",
    )
    generation = read(inputs(**{f"return_{name}": [True] for name in asked}))
    perf = PerfMetrics(
        arrival_time_ns=1,
        first_scheduled_time_ns=2,
        first_token_time_ns=3,
        last_token_time_ns=4,
        kv_cache_alloc_total_blocks=5,
        kv_cache_alloc_new_blocks=4,
        kv_cache_reused_blocks=1,
    )
    context, chosen = np.arange(30, dtype=np.float32), np.arange(10, dtype=np.float32)
    part = Part([5, 6, 7, 8], 1, [-0.5], -0.75, context.tobytes(), chosen.tobytes(), perf)
    tensors = write_part(generation, 0, part)
    expected = {
        "output_ids": (np.int32, [[[5, 6, 7, 8]]]),
        "sequence_length": (np.int32, [[4]]),
        "num_input_tokens": (np.int32, [[3]]),
        "num_output_tokens": (np.int32, [[1]]),
        "output_log_probs": (np.float32, [[[-0.5]]]),
        "cum_log_probs": (np.float32, [[-0.75]]),
        "context_logits": (np.float32, context.reshape(1, 3, 10).tolist()),
        "generation_logits": (np.float32, chosen.reshape(1, 1, 1, 10).tolist()),
        **{f"{name}_time_ns": (np.int64, [[time]]) for name, time in zip(TIMES, (1, 2, 3, 4), strict=True)},
        "kv_cache_alloc_total_blocks": (np.int32, [[5]]),
        "kv_cache_alloc_new_blocks": (np.int32, [[4]]),
        "kv_cache_reused_blocks": (np.int32, [[1]]),
    }
    assert {name: (value.dtype.type, value.tolist()) for name, value in tensors.items()} == expected
    contract = {tensor["name"]: tensor for tensor in UPSTREAM["tensorrt_llm"]["outputs"]}
    for name, value in tensors.items():
        dtype = DTYPES.get(contract[name]["data_type"], np.float32)
        assert (value.dtype, value.ndim) == (np.dtype(dtype), 1 + len(contract[name]["dims"]))


def test_a_plain_request_gets_tokens_only() -> None:
    tensors = write_part(read(inputs()), 0, Part([], 0, [], 0.0))
    assert {name: value.shape for name, value in tensors.items()} == {
        "output_ids": (1, 1, 0),
        "sequence_length": (1, 1),
    }
