"""`trtqwen simulate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.cli import app
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer

H100, REPLICAS = "qwen2.5-7b-bf16-torch-h100", "qwen2.5-7b-bf16-tp1x4-4090d"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_prints_bound_and_forecast_apart() -> None:
    words = (H100, "--workload", "smoke", "--requests", 32, "--concurrency", 8)
    result = run(*words, "--goodput", "time_to_first_token:1000", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    forecast, bound = report["forecast"], report["bound"]
    assert 0 < forecast["output_token_throughput"]["avg"] < bound["output_token_throughput"]
    assert forecast["success_rate"]["avg"] == 1
    assert forecast["goodput"]["avg"] == pytest.approx(forecast["request_throughput"]["avg"])
    assert forecast["time_to_first_token"]["p99"] <= forecast["request_latency"]["p99"]
    assert report["schedule"]["max_active"] == 8
    plain = run(*words).stdout
    assert "bound     " in plain
    assert "forecast  " in plain


def test_the_same_words_give_the_same_forecast_and_a_larger_batch_a_faster_one() -> None:
    words = (H100, "--workload", "smoke", "--requests", 32, "--concurrency", 32, "--json")
    narrow = (*words, "--set", "engine.max_batch_size=4")
    rates = [
        json.loads(run(*one).stdout)["forecast"]["output_token_throughput"]["avg"] for one in (words, words, narrow)
    ]
    assert rates[0] == rates[1] > rates[2]


def test_a_card_without_measurements_is_said_to_be_a_forecast() -> None:
    words = (REPLICAS, "--workload", "smoke", "--requests", 8, "--rate", 50, "--json")
    report = json.loads(run(*words).stdout)
    assert report["kind"] == "forecast"
    assert any("RTX 4090D" in note and "forecasts" in note for note in report["notes"])
    assert report["input_config"]["loadgen"]["mode"] == "open loop"


def test_sends_what_bench_sends_where_the_model_is_at_hand() -> None:
    words = ("qwen2-tiny-cpu", "--set", "host.card=h100-sxm", "--set", "host.gpus=2", "--model", MODEL)
    report = json.loads(run(*words, "--workload", "smoke", "--requests", 4, "--json").stdout)
    expected = make_workloads(WorkloadOptions("smoke", 4), Tokenizer(MODEL), 1)
    assert report["input_config"]["workload"]["sha256"] == [one.digest for one in expected]


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (("qwen2-tiny-cpu",), "names no card", "host.card"),
        ((H100, "--workload", "chatt"), "no such workload or file, did you mean 'chat'", "smoke"),
        ((H100, "--workload", "FILE"), "needs the tokenizer", "--model"),
        ((H100, "--served"), "is not known for backend torch", "--served"),
        ((H100, "--set", "checkpoint.tp_size=3"), "tp_size", ""),
        ((H100, "--workload", "rag", "--set", "engine.max_seq_len=512", "--requests", 2), "no request can be", ""),
        (("qwen2.5-32b-int8-wo-tp4-4090d", "--set", "checkpoint.tp_size=1"), "", ""),
    ],
)
def test_errors_say_what_and_what_to_do(words: tuple[object, ...], what: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 1}\n')
    result = run(*(file if word == "FILE" else word for word in words))
    assert isinstance(result.exception, InputError)
    assert what in result.exception.what
    assert hint in (result.exception.hint or "")
