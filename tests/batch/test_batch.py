"""Batches on the embedded engine: three input formats, order, errors of lines, and a run after a kill."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from scripts.stand_in_engine import write_stand_in_repository
from tests.command_line import trtqwen
from tests.slow import SLOW
from tests.standins import vllm_server
from tests.waiting import wait_for
from trtqwen.artifact.manifest import write_manifest
from trtqwen.batch.lines import Defaults, Line, read_lines, result
from trtqwen.batch.local import LocalTriton
from trtqwen.batch.run import _survive, run_batch
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError, InputError, OutputError, ServerError
from trtqwen.executor.executor import Executor
from trtqwen.gateway.generation.health import Monitor
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import ServeRecipe
from trtqwen.system.processes import child
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.usefixtures("quick_ranks")
DEFAULTS = Defaults(chat=False, fields={"max_tokens": 8, "temperature": 0})


def written(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_formats_and_errors_in_order(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 12, "temperature": 0}
    file = written(
        tmp_path / "in.jsonl",
        {"prompt": "Hello", "max_tokens": 5},
        "{broken",
        {"token_ids": [5, 6, 7]},
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt", **chat}},
        {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}},
        chat,
        {"prompt": "x", "no_such_field": 1},
        {"prompt": "Once", "n": 2, "logprobs": 0},
        7,
    )
    lines = read_lines(file, DEFAULTS)
    done = run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out.jsonl")
    out = results(tmp_path / "out.jsonl")
    assert [entry.get("index") for entry in out] == [0, 1, 2, None, None, 5, 6, 7, 8]
    assert (done.lines, done.failed, done.reused) == (9, 4, 0)
    assert out[0]["usage"] == {"prompt_tokens": len(Tokenizer(MODEL).encode("Hello")), "completion_tokens": 5}
    assert out[1]["error"]["message"].startswith("line 2 is not JSON")
    assert out[2]["usage"]["prompt_tokens"] == 3
    response = out[3]["response"]
    assert (out[3]["custom_id"], response["status_code"], out[3]["error"]) == ("a", 200, None)
    assert response["body"]["choices"][0]["message"]["content"] == out[5]["text"]
    assert out[4]["response"] is None
    assert "/v1/embeddings" in out[4]["error"]["message"]
    assert "no_such_field" in out[6]["error"]["message"]
    assert len(out[7]["choices"]) == 2
    assert out[7]["logprobs"]["token_logprobs"]
    with pytest.raises(OutputError, match="exists"):
        run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out.jsonl")


def test_a_prompt_is_a_message_where_it_is_to_be_one(tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_text(json.dumps(["Hello", {"prompt": "raw", "max_tokens": 3}]))
    chat = read_lines(file, Defaults(chat=True, fields={"max_tokens": 9}))
    assert [dict(line.body) for line in chat] == [
        {"max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]},
        {"max_tokens": 3, "messages": [{"role": "user", "content": "raw"}]},
    ]
    with pytest.raises(InputError, match="holds no request"):
        read_lines(written(tmp_path / "empty.jsonl", ""), DEFAULTS)
    with pytest.raises(InputError, match="cannot be read"):
        read_lines(tmp_path / "missing", DEFAULTS)


@pytest.mark.slow
def test_a_killed_batch_goes_on(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    """Killed in the middle: the second run takes what is there, and the output is that of one run."""
    file = written(
        tmp_path / "in.jsonl", *({"prompt": f"Tell me {number}", "max_tokens": 24} for number in range(40))
    )
    output, journal = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.part"
    command = [sys.executable, "-m", "trtqwen", "batch", str(bundled_engine()), "--input-file", str(file)]
    command += ["--output", str(output), "--no-chat", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 5, 100)
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    with journal.open("a") as part:
        part.write('{"line": 39, "resu')  # cut off
    lines = read_lines(file, Defaults(chat=False, fields={"max_tokens": 256, "temperature": 0.0}))
    done = run_batch(bundled_engine(), ServeRecipe(), lines, output)
    assert 5 <= done.reused < 40
    assert not journal.exists()
    whole = tmp_path / "whole.jsonl"
    run_batch(bundled_engine(), ServeRecipe(), lines, whole)
    assert results(output) == results(whole)


def test_the_journal_of_another_batch_is_kept(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / ".out.part").write_text('{"digest": "other"}\n')
    lines = read_lines(written(tmp_path / "in.jsonl", {"prompt": "Hello"}), DEFAULTS)
    with pytest.raises(OutputError, match="journal of a batch with another input"):
        run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out")
    run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out", force=True)
    assert len(results(tmp_path / "out")) == 1


def test_an_engine_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", {"prompt": "Hello"})
    words = [
        "batch",
        "cpu-demo",
        "--input-file",
        str(file),
        "--output",
        str(tmp_path / "out"),
        "--engines",
        "nowhere",
    ]
    done = trtqwen(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_engine_that_dies_keeps_what_is_done(
    bundled_engine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Executor] = []
    before = Executor.__init__

    def note(self: Executor, *words: Any, **names: Any) -> None:
        before(self, *words, **names)
        started.append(self)

    monkeypatch.setattr(Executor, "__init__", note)
    lines = read_lines(
        written(tmp_path / "in.jsonl", *({"prompt": f"Say {number}", "max_tokens": 50} for number in range(60))),
        DEFAULTS,
    )
    finished = 0

    def kill_after_ten(count: int, tokens: int) -> None:
        nonlocal finished
        finished += count
        if finished - count < 10 <= finished:
            started[0]._processes[0].kill()

    with pytest.raises(EngineError, match="the engine has stopped"):
        run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out", on_progress=kill_after_ten)
    kept = (tmp_path / ".out.part").read_text().splitlines()
    assert 10 <= len(kept) - 1 < 60
    done = run_batch(bundled_engine(), ServeRecipe(), lines, tmp_path / "out")
    assert done.failed == 0
    assert done.reused >= 10


class Late:
    """An engine whose end, or whose answer to a probe, is seen after many looks."""

    def __init__(self, *, dies: bool) -> None:
        self.dies = dies
        self.checks = self.looks = 0

    def check(self) -> None:
        self.checks += 1
        if self.dies and self.checks > 100:
            raise EngineError("the engine has stopped")

    def look(self) -> None:
        self.looks += 1

    def answered_since(self, when: float) -> bool:
        return not self.dies and self.looks > 100


def test_a_failed_request_waits_until_the_engine_has_answered_or_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late a slow machine sees it: a line that died with its engine must not become a result."""
    monkeypatch.setattr("trtqwen.batch.run._LOOK_PERIOD", 0.0)
    dead, alive = Late(dies=True), Late(dies=False)
    with pytest.raises(EngineError, match="the engine has stopped"):
        asyncio.run(_survive(cast(LocalTriton, dead), cast(Monitor, dead)))
    asyncio.run(_survive(cast(LocalTriton, alive), cast(Monitor, alive)))
    assert alive.checks == 101


@pytest.fixture
def served_engine(
    request: pytest.FixtureRequest,
    bundled_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An engine that Triton serves: on vLLM's stand-in, or of TensorRT, on one that repeats its prompt."""
    if request.param == "vllm":
        monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", str(vllm_server.write_python(tmp_path / "python")))
        monkeypatch.setenv("STAND_IN_VLLM", json.dumps({"gap": 0.02}))
        return bundled_engine(backend="vllm")
    engine = Path(shutil.copytree(bundled_engine(), tmp_path / "engine"))
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps(config | {"backend": "tensorrt_llm", "version": "1.2.1"}))
    (engine / "manifest.json").unlink()
    write_manifest(engine, "engine", {}, {})

    def write_stand_in(_: Path, serve: ServeRecipe, output: Path) -> None:
        write_repository(bundled_engine(), serve, output.with_name("real"))
        write_stand_in_repository(output.with_name("real"), output, step_ms=20)

    monkeypatch.setattr("trtqwen.batch.run.write_repository", write_stand_in)
    return engine


@SLOW
@pytest.mark.triton
@pytest.mark.parametrize("served_engine", ["vllm", "tensorrt_llm"], indirect=True)
def test_an_engine_behind_triton_dies_and_the_batch_goes_on(
    served_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[TritonServer] = []
    before = TritonServer.start

    def note(self: TritonServer) -> None:
        before(self)
        started.append(self)

    monkeypatch.setattr(TritonServer, "start", note)
    prompts = [{"prompt": f"Say {number}", "max_tokens": 8, "ignore_eos": True} for number in range(80)]
    lines = read_lines(written(tmp_path / "in.jsonl", *prompts[:40], "{broken", *prompts[40:]), DEFAULTS)
    finished = 0

    def kill_after_five(count: int, tokens: int) -> None:
        nonlocal finished
        finished += count
        if finished - count < 6 <= finished:
            os.kill(child(started[0].vllm_pid or started[0].pid), signal.SIGKILL)

    output = tmp_path / "out"
    # What is seen first: the end of the process, or of its connection.
    with pytest.raises(ServerError, match=r"was ended by SIGKILL|the engine has stopped \(vLLM does not answer"):
        run_batch(served_engine, ServeRecipe(), lines, output, on_progress=kill_after_five)
    assert not output.exists()
    done = run_batch(served_engine, ServeRecipe(), lines, output)
    assert (done.lines, done.failed) == (81, 1)
    assert 6 <= done.reused < 81
    out = results(output)
    assert "line 41 is not JSON" in out[40]["error"]["message"]
    assert [row["index"] for row in out] == list(range(81))
    assert 0 < done.output_tokens <= sum(row["usage"]["completion_tokens"] for row in out if "usage" in row)


def test_results_of_failed_requests() -> None:
    told = result(Line(3), 400, {"error": {"message": "no", "param": "n"}})
    assert told == {"index": 3, "error": {"message": "no", "param": "n"}}
