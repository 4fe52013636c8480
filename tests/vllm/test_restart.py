"""`trtqwen serve --restart` with a real vLLM that is killed: it comes back by itself, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.deploy.conftest import Serve
from tests.waiting import wait_for
from trtqwen.recipe import ServeRecipe, VllmSettings
from trtqwen.system.guardian import shared_memory_of
from trtqwen.system.processes import living
from trtqwen.triton.repository import write_repository
from trtqwen.vllm.server import PYTHON_VARIABLE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.triton,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no vLLM"),
    pytest.mark.timeout(900),
]
STARTING = 600.0  # seconds


def api_server(engine: Path) -> int | None:
    """The process of vLLM's API server for an engine."""
    for directory in Path("/proc").iterdir():
        with suppress(OSError):
            if directory.name.isdecimal():
                command = (directory / "cmdline").read_text("utf-8", "replace")
                if "vllm.entrypoints.openai.api_server" in command and str(engine) in command:
                    return int(directory.name)
    return None


def kill(engine: Path) -> set[str]:
    """Kill it; returns the files in shared memory that its processes had."""
    assert wait_for(lambda: api_server(engine) is not None)
    pid = api_server(engine)
    assert pid is not None
    files = {file for member in living(os.getsid(pid)) for file in shared_memory_of(member)}
    os.kill(pid, signal.SIGKILL)
    return files


def test_a_killed_vllm_comes_back_with_a_pause_that_grows(
    bundled_engine: Callable[..., Path], tmp_path: Path
) -> None:
    engine = bundled_engine(backend="vllm", vllm=VllmSettings(arguments={"enforce-eager": True}))
    write_repository(engine, ServeRecipe(triton_max_batch_size=8), tmp_path / "repository")
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        serve = Serve(tmp_path / "repository", "--restart", errors=file)
    try:
        model = json.loads(serve.get("/v1/models")[1])["data"][0]["id"]
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        status, first = serve.post("/v1/completions", body)
        assert status == 200
        for words in ("starting it again in 1 s", "starting it again in 2 s"):
            files = kill(engine)
            assert wait_for(lambda: words in errors.read_text())  # noqa: B023
            assert not any(map(os.path.exists, files))
            status, state = serve.get("/ready")
            assert (status, json.loads(state)["status"]) == (503, "restarting")
            assert serve.post("/v1/completions", body)[0] == 503
            assert serve.get("/health")[0] == 200
        assert "vLLM was ended by SIGKILL" in errors.read_text()
        assert wait_for(lambda: serve.get("/ready")[0] == 200, STARTING)
        status, again = serve.post("/v1/completions", body)
        assert status == 200
        assert json.loads(again)["choices"][0]["text"] == json.loads(first)["choices"][0]["text"]
    finally:
        assert serve.stop() == 0
    assert api_server(engine) is None
