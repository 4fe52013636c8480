from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.standins.host import install
from trtqwen.cli import app
from trtqwen.demo import MODEL
from trtqwen.demo.walkthrough import load_prompts
from trtqwen.diagnostics import EngineError, InputError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.selftest.run import MAX_TOKENS, DtypeResult, PromptResult, Verdict, compare_devices, judge, run_selftest
from trtqwen.system.host import Host, read_host

pytestmark = pytest.mark.usefixtures("quick_ranks")
PACKAGES = Path(__file__).parent / "standins" / "packages"


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """Greedy answers of the bundled model, by transformers."""
    from transformers import Qwen2ForCausalLM

    tokenizer = Tokenizer(MODEL)
    assert tokenizer.chat_template is not None
    model = Qwen2ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    result = []
    for prompt in load_prompts():
        message = {"role": "user", "content": prompt.prompt}
        ids = torch.tensor([tokenizer.encode(render_chat(tokenizer.chat_template, [message]))])
        output = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
        result.append(output[0, ids.shape[1] :].tolist())
    return result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    install(tmp_path / "machine", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{PACKAGES}{os.pathsep}{os.environ['PYTHONPATH']}")
    return read_host()


def test_answers_of_another_engine_pass_and_a_wrong_token_does_not(
    host: Host, answers: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [list(answer) for answer in answers]
    told[2][7] = (told[2][7] + 1) % 4096
    (tmp_path / "answers.json").write_text(json.dumps(told))
    monkeypatch.setenv("STANDIN_ANSWERS", str(tmp_path / "answers.json"))
    (result,) = run_selftest(host, tmp_path, dtypes=["bfloat16"])
    bad = result.prompts[2]
    good = replace(result, prompts=result.prompts[:2] + result.prompts[3:])
    assert (result.ok, bad.same_tokens, bad.verdict) == (False, 7, "differs")
    assert bad.margin is not None
    assert bad.margin > 1
    assert good.ok
    assert sum(prompt.same_tokens for prompt in good.prompts) > 7 * MAX_TOKENS * 0.9
    assert (tmp_path / "bfloat16" / "build.log").is_file()


@pytest.mark.parametrize("verdict", ["same", "tie", "differs"])
def test_the_command_tells_the_verdict_by_its_exit_code(
    verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [DtypeResult("float16", (PromptResult("hi", 5, verdict, None if verdict == "same" else 0.05),))]
    monkeypatch.setattr("trtqwen.selftest.run.run_selftest", lambda host, directory, backend, watch: results)
    for json_flag in ([], ["--json"]):
        result = CliRunner().invoke(app, ["selftest", "--engines", str(tmp_path), *json_flag])
        assert result.exit_code == (1 if verdict == "differs" else 0)
        assert verdict in result.stdout
        assert json.loads((tmp_path / "selftest" / "result.json").read_text())["ok"] is (verdict != "differs")
    assert json.loads(result.stdout)["ok"] == (verdict != "differs")


def test_an_engine_that_does_not_run_is_explained(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtqwen.selftest.run._run_embedded", lambda engine, prompts, config: [[] for _ in prompts])
    monkeypatch.setenv("STANDIN_FAIL", "run")
    with pytest.raises(EngineError, match=r"did not run \(exit code 1\): the KV cache is exhausted"):
        run_selftest(host, tmp_path / "work", dtypes=["float16"])


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"lacks trtllm-build and a GPU; run `trtqwen selftest --in-container` .*26\.07"
    ) as caught:
        run_selftest(Host(), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_engine_is_held_against_the_cpu(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    """On a GPU host the second is a card; here it is the plain attention."""
    engine = bundled_engine()
    checkpoint = engine.parent / "checkpoint-tp1"
    result = compare_devices(checkpoint, engine, "float32", ExecutorConfig(device="cpu", attention="plain"))
    assert result.ok
    assert sum(prompt.same_tokens for prompt in result.prompts) > 7 * MAX_TOKENS * 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_card_one_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="PyTorch finds no CUDA device"):
        run_selftest(Host(), tmp_path, backend="torch")
    result = CliRunner().invoke(app, ["selftest", "--backend", "torch", "--in-container"])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(
    ("theirs", "distance", "verdict", "same"),
    [
        ([1, 2, 3], 9.0, "same", 3),
        ([1, 9, 3], 0.05, "tie", 1),
        ([1, 9, 3], 0.2, "differs", 1),
        ([1, 2], 0.0, "differs", 2),
        ([], 0.0, "differs", 0),
    ],
)
def test_the_first_difference_decides(theirs: list[int], distance: float, verdict: str, same: int) -> None:
    asked = []

    def margin(sequence: list[int], token: int) -> float:
        asked.append((sequence, token))
        return distance

    result = judge("hi", [7, 8], [1, 2, 3], theirs, margin, 0.1)
    assert (result.verdict, result.same_tokens) == (verdict, same)
    assert asked == ([([7, 8, 1], 9)] if result.margin is not None else [])
