"""The executor over TensorRT-LLM's LLM API, on a stand-in that is built from upstream's signatures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.export.test_export import GOLDEN
from tests.standins import llm_api
from tests.waiting import wait_for
from trtqwen.batch.lines import Defaults, read_lines
from trtqwen.batch.run import run_batch
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError, RequestError, ServerError, first_hint, first_problem
from trtqwen.engine.builder import build_engine
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import FinishReason, OutputConfig, Request, Response
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.llmapi.executor import LlmApiExecutor, sampling_params
from trtqwen.llmapi.settings import arguments
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, LlmApiSettings, Recipe, ServeRecipe

LIMITS: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 256, "max_seq_len": 128, "tokens_per_block": 32}


@pytest.fixture(scope="session")
def llm_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llmapi")
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float16")), home / "checkpoint")
    build_engine(home / "checkpoint", EngineRecipe(backend="llmapi", **LIMITS), home / "engine")
    return home / "engine"


@pytest.fixture
def executor(llm_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmApiExecutor]:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", llm_api.package())
    with LlmApiExecutor(llm_engine, ExecutorConfig(max_queue_size=1)) as running:
        yield running


def llm() -> llm_api.LLM:
    [one] = llm_api.LLM.started
    return one


def request(**fields: Any) -> Request:
    return Request(**{"id": "1", "input_token_ids": (1, 2, 3), "max_tokens": 6, **fields})


def joined(responses: list[Response]) -> tuple[list[int], FinishReason | None]:
    return [token for response in responses for token in response.token_ids], responses[-1].finish_reason


def test_cumulative_parts_become_new_tokens(executor: LlmApiExecutor) -> None:
    output = OutputConfig(return_log_probs=True, return_perf_metrics=True)
    [responses] = executor.generate([request(output=output)])
    assert joined(responses) == ([5, 6, 7, 8, 5, 6], FinishReason.LENGTH)
    assert [len(response.token_ids) for response in responses] == [1] * 6
    assert [value for response in responses for value in response.log_probs] == [0, -1, -2, -3, -4, -5]
    assert responses[-1].perf_metrics is not None
    stats = executor.stats()
    assert (stats.active, stats.used_blocks, stats.max_blocks, stats.generation_requests) == (3, 7, 100, 2)


@pytest.mark.parametrize("tells_end_id", [True, False])
@pytest.mark.parametrize(
    ("fields", "answer", "reason"),
    [
        ({"end_id": 7}, [5, 6], FinishReason.END_ID),
        ({"stop_words": ((7,),)}, [5, 6, 7], FinishReason.STOP_WORDS),
        ({"stop_words": ((6, 7),)}, [5, 6, 7], FinishReason.STOP_WORDS),
    ],
)
def test_answers_end_by_the_executors_rules(
    executor: LlmApiExecutor, fields: dict[str, Any], answer: list[int], reason: FinishReason, tells_end_id: bool
) -> None:
    llm().tells_end_id = tells_end_id
    [responses] = executor.generate([request(**fields)])
    assert joined(responses) == (answer, reason)
    if len(fields.get("stop_words", ((),))[0]) > 1:
        assert wait_for(lambda: len(llm().aborted) == 1)


def test_cancel_aborts(executor: LlmApiExecutor) -> None:
    seen: list[Response] = []
    llm().gap = 0.01
    executor.submit(request(max_tokens=100), seen.append)
    assert wait_for(lambda: bool(seen))
    executor.cancel("1")
    assert wait_for(lambda: seen[-1].finish_reason is FinishReason.CANCELLED)
    assert wait_for(lambda: len(llm().aborted) == 1)


def test_salts_keep_prompts_apart(executor: LlmApiExecutor) -> None:
    executor.generate([request(cache_salt="a"), request(id="2")])
    assert sorted(map(str, llm().salts)) == ["None", "a"]


def test_the_death_of_the_llm_is_told(executor: LlmApiExecutor) -> None:
    llm().broken = True
    [responses] = executor.generate([request()])
    assert responses[-1].error == "the LLM API fails: the worker has ended"
    with pytest.raises(EngineError, match="the engine has stopped"):
        executor.stats()
    with pytest.raises(EngineError, match="the engine has stopped"):
        executor.submit(request(id="2"), lambda response: None)


def test_the_queue_is_bounded(executor: LlmApiExecutor) -> None:
    llm().gap = 1
    for index in range(5):
        executor.submit(request(id=str(index), max_tokens=90), lambda response: None)
    with pytest.raises(EngineError, match="Maximum queue size of 1"):
        executor.submit(request(id="x"), lambda response: None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"top_k": 1, "seed": 0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}),
        ({"sampling": {"top_p": 0.5, "seed": 7}}, {"top_p": 0.5, "seed": 7, "temperature": 1.0}),
        ({"end_id": 9}, {"end_id": 9, "pad_id": 9, "ignore_eos": False}),
        ({"bad_words": ((4,),)}, {"bad_token_ids": [4]}),
        ({"max_tokens": 500}, {"max_tokens": 125}),
        ({"guided_decoding": {"guide_type": "regex", "guide": "a"}}, {"end_id": Tokenizer(MODEL).end_id}),
    ],
)
def test_sampling_params(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = sampling_params(llm_api.package(), request(**fields), 128, 512, Tokenizer(MODEL))
    for name, value in expected.items():
        assert getattr(params, name) == value, name


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"output": {"return_context_logits": True}}, "return_context_logits"),
        ({"bad_words": ((4, 5),)}, "bad_words_list"),
        ({"priority": 1}, "priority"),
        ({"input_token_ids": (1,) * 128}, "Prompt length (128)"),
    ],
)
def test_what_the_api_cannot_do_is_refused_by_name(fields: dict[str, Any], tensor: str) -> None:
    with pytest.raises(RequestError) as caught:
        sampling_params(llm_api.package(), request(**fields), 128, 512, Tokenizer(MODEL))
    assert caught.value.what.startswith(tensor)


@pytest.mark.parametrize("release", ["1.2.1", "1.3.0", "1.3.0rc27"])
def test_arguments_are_known_to_each_release(llm_engine: Path, release: str) -> None:
    config = read_engine_config(llm_engine)
    made = arguments(config, ExecutorConfig(max_tokens_in_paged_kv_cache=640), llm_engine, release, [])
    assert made["kv_cache_config"]["max_tokens"] == 640
    assert made["scheduler_config"] == {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}
    assert "allreduce_strategy" not in made
    wide = config.model_copy(update={"pretrained_config": _tp2(config.pretrained_config)})
    made = arguments(wide, ExecutorConfig(), llm_engine, release, ["NVIDIA GeForce RTX 4090 D"] * 2)
    assert made["allreduce_strategy"] == "NCCL"


def _tp2(config: Any) -> Any:
    return config.model_copy(update={"mapping": config.mapping.model_copy(update={"tp_size": 2})})


def test_an_argument_of_another_release(llm_engine: Path) -> None:
    config = read_engine_config(llm_engine)
    newer = config.model_copy(
        update={"llmapi": LlmApiSettings(release="1.3.0", arguments={"orchestrator_type": "ray"})}
    )
    with pytest.raises(EngineError, match=r"LLM of TensorRT-LLM 1\.2\.1 has no argument 'orchestrator_type'"):
        arguments(newer, ExecutorConfig(), llm_engine, "1.2.1", [])


def test_int8_weight_only_keeps_16_bit_weights_and_says_so(tmp_path: Path) -> None:
    settings = CheckpointRecipe(dtype="float16", quant="int8_wo")
    run_conversion(plan_conversion(GOLDEN / "g01_fp16_tp1_untied" / "hf", settings), tmp_path / "checkpoint")
    build_engine(tmp_path / "checkpoint", EngineRecipe(backend="llmapi", **LIMITS), tmp_path / "engine")
    config = read_engine_config(tmp_path / "engine")
    assert arguments(config, ExecutorConfig(), tmp_path, "1.2.1", [])["quant_config"] == {"quant_algo": "W8A16"}
    assert "quantization_config" not in (tmp_path / "engine" / "model" / "config.json").read_text()


@pytest.mark.parametrize(
    ("checkpoint", "engine", "message"),
    [
        ({"quant": "int8_sq"}, {}, "has no SmoothQuant"),
        ({"kv_cache": "int8"}, {}, "no INT8 KV cache"),
        ({"quant": "int8_wo", "int8_layout": "sm80"}, {}, "use plain"),
        ({}, {"llmapi": {"arguments": {"atn_backend": "X"}}}, "did you mean 'attn_backend'"),
        ({}, {"llmapi": {"arguments": {"dtype": "half"}}}, "trtqwen sets dtype"),
        ({}, {"backend": "torch", "llmapi": {}}, "llmapi is a section of backend: llmapi"),
    ],
)
def test_recipes_without_a_counterpart_are_refused(
    checkpoint: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    content = {"name": "r", "description": "d", "checkpoint": checkpoint, "engine": {"backend": "llmapi", **engine}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(content)
    assert message in f"{first_problem(caught.value)}; {first_hint(caught.value)}"


def test_without_tensorrt_llm_it_is_one_sentence(llm_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match="tensorrt_llm cannot be imported"):
        LlmApiExecutor(llm_engine)


def test_an_llm_that_does_not_start(
    llm_engine: Path, monkeypatch: pytest.MonkeyPatch, executor: Callable[..., Any]
) -> None:
    monkeypatch.setattr(llm_api.LLM, "__init__", _no_gpu)
    with pytest.raises(EngineError, match="did not start: no GPU"):
        LlmApiExecutor(llm_engine)


def _no_gpu(self: Any, **arguments: Any) -> None:
    raise RuntimeError("no GPU")


def test_a_batch_is_answered_in_order(llm_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", llm_api.package())
    entries: list[Any] = [{"prompt": f"Tell me {number}", "max_tokens": 3 + number} for number in range(8)]
    entries[2] = {"prompt": "x", "top_logprobs": 3}
    entries[5] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, entries), "{broken"]))
    lines = read_lines(tmp_path / "in.jsonl", Defaults(chat=False, fields={"temperature": 0, "ignore_eos": True}))
    done = run_batch(llm_engine, ServeRecipe(), lines, tmp_path / "out.jsonl")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (done.lines, done.failed, done.output_tokens) == (9, 2, sum((3, 4, 6, 7, 6, 9, 10)))
    assert [entry["index"] for entry in out] == list(range(9))
    assert "top_logprobs" in out[2]["error"]["message"]
    assert out[8]["error"]["message"].startswith("line 9 is not JSON")
    tokenizer, ids = Tokenizer(MODEL), [5, 6, 7, 8] * 3
    for number in (0, 1, 3, 4, 6, 7):
        assert out[number]["text"] == tokenizer.decode(ids[: 3 + number])
    assert out[5]["usage"]["completion_tokens"] == 6
    assert llm().stopped


def test_a_batch_goes_on_after_the_death_of_the_llm(
    llm_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", llm_api.package())
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Tell me {number}", "max_tokens": 5}) for number in range(40))
    )
    lines = read_lines(tmp_path / "in.jsonl", Defaults(chat=False, fields={"temperature": 0, "ignore_eos": True}))
    output = tmp_path / "out.jsonl"

    def break_down(count: int, tokens: int) -> None:
        if tokens:
            llm().broken = True

    with pytest.raises((EngineError, ServerError), match="the worker has ended"):
        run_batch(llm_engine, ServeRecipe(), lines, output, on_progress=break_down)
    assert not output.exists()
    monkeypatch.setitem(sys.modules, "tensorrt_llm", llm_api.package())
    done = run_batch(llm_engine, ServeRecipe(), lines, output)
    assert 1 <= done.reused < 40
    assert done.failed == 0
    texts = {json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()}
    assert texts == {Tokenizer(MODEL).decode([5, 6, 7, 8, 5])}
