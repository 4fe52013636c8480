"""A service moves from the embedded engine to a real vLLM: shadow, canary, promotion, and no lost request."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gateway.models_service import ADMIN, Service, of_repository
from tests.waiting import wait_for
from trtqwen.recipe import ServeRecipe, VllmSettings
from trtqwen.triton.repository import write_repository
from trtqwen.vllm.server import PYTHON_VARIABLE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.triton,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no vLLM"),
    pytest.mark.timeout(900),
]
PROMPTS = ["The capital of France", "def add(a, b):", "Once upon a time", "One, two, three"]


def test_a_service_moves_to_vllm_without_a_lost_request(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    old, new = tmp_path / "embedded", tmp_path / "vllm"
    eager = VllmSettings(arguments={"enforce-eager": True})
    for engine, repository in ((bundled_engine(), old), (bundled_engine(backend="vllm", vllm=eager), new)):
        write_repository(engine, ServeRecipe(triton_max_batch_size=8), repository)
    table, admins = tmp_path / "models.yaml", tmp_path / "admins.yaml"
    target = {"name": "embedded", "repository": str(old)}
    table.write_text(yaml.safe_dump({"models": {"qwen": {"targets": [target], "sticky": "none"}}}))
    admins.write_text(f"keys:\n  - {{name: operator, key: {ADMIN}}}\n")
    service = Service(table, admins)

    def ask(prompt: str) -> Any:
        return service.post(
            "/v1/completions", {"model": "qwen", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        )

    def text(prompt: str) -> str:
        return str(ask(prompt)["choices"][0]["text"])

    stop = threading.Event()
    lost: list[Exception] = []
    sent: list[int] = []

    def load() -> None:
        while not stop.wait(0.2):
            sent.append(0)
            try:
                assert text(PROMPTS[len(sent) % len(PROMPTS)]) == expected[len(sent) % len(PROMPTS)]
            except (OSError, AssertionError) as problem:
                lost.append(problem)

    def change(*arguments: str) -> None:
        done = service.models(*arguments)
        assert done.returncode == 0, done.stderr

    def figures(role: str) -> dict[str, Any]:
        done = service.models("report", "--json")
        assert done.returncode == 0, done.stderr
        [model] = json.loads(done.stdout)["models"]
        found = [one for one in model["targets"] if (one["target"], one["role"]) == ("vllm", role)]
        return dict(found[0]) if found else {"copies": {}, "outcomes": {}}

    try:
        expected = [text(prompt) for prompt in PROMPTS]
        client = threading.Thread(target=load)
        client.start()
        change("shadow", "qwen", "--repo", str(new), "--name", "vllm", "--share", "100")
        assert wait_for(lambda: figures("shadow")["copies"].get("greedy", {}).get("same", 0) >= 5)
        assert figures("shadow")["copies"]["greedy"].get("different", 0) == 0
        change("canary", "qwen", "--name", "vllm", "--share", "50")
        assert wait_for(lambda: figures("serve")["outcomes"].get("answered", 0) >= 5)
        change("promote", "qwen")
        stop.set()
        client.join(60)
        assert not lost
        assert wait_for(lambda: not of_repository(old))
        assert [text(prompt) for prompt in PROMPTS] == expected
    finally:
        stop.set()
        code = service.stop()
    assert code == 0
    assert not of_repository(new)
