"""`trtqwen serve --models` and `trtqwen models`: Tritons start and stop as the table says."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml

from scripts.stand_in_engine import write_stand_in_repository
from tests.gateway.models_service import ADMIN, Service, of_repository
from tests.waiting import wait_for
from trtqwen.artifact.manifest import read_manifest, write_manifest

pytestmark = pytest.mark.triton


@pytest.fixture
def broken_repository(engine_repository: Path, tmp_path: Path) -> Path:
    """A finished repository whose engine raises an exception as it loads."""
    output = tmp_path / "broken"
    write_stand_in_repository(engine_repository, output)
    manifest = read_manifest(output, "repository")
    (output / "tensorrt_llm" / "1" / "model.py").write_text("raise RuntimeError('the plan is of another release')\n")
    (output / "manifest.json").unlink()
    write_manifest(output, "repository", manifest.inputs, manifest.parameters)
    return output


def test_engines_start_and_stop_as_the_table_says(
    stand_in_repository: Path, unhurried_repository: Path, broken_repository: Path, tmp_path: Path
) -> None:
    table, admins = tmp_path / "models.yaml", tmp_path / "admins.yaml"
    target = {"name": "first", "repository": str(stand_in_repository)}
    table.write_text(yaml.safe_dump({"models": {"qwen": {"targets": [target]}}}))
    admins.write_text(f"keys:\n  - {{name: operator, key: {ADMIN}}}\n")
    others = set(of_repository(stand_in_repository))  # another test's server
    service = Service(table, admins)
    try:
        assert service.ask("hello")["choices"][0]["message"]["content"] == "hello"
        before = set(of_repository(stand_in_repository)) - others
        assert len(before) == 1
        stop = threading.Event()
        wrong: list[OSError] = []
        answers: list[int] = []

        def load() -> None:
            while not stop.wait(0.1):  # less than all of the machine: the second Triton starts meanwhile
                try:
                    answers.append(service.ask("/again 60 x ")["usage"]["completion_tokens"])
                except OSError as problem:
                    wrong.append(problem)

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        changed = service.models("set", "qwen", "--repo", str(unhurried_repository), "--name", "second")
        stop.set()
        for thread in threads:
            thread.join(60)
        assert changed.returncode == 0, changed.stderr
        assert not wrong
        assert len(set(answers)) == 1  # all of them are whole
        service.ask("hello")
        with urllib.request.urlopen(f"{service.url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        assert re.findall(r'target_requests_total\{.*outcome="answered",role="serve",target="(\w+)"', metrics) == [
            "first",
            "second",
        ]
        # The last request on the old one has ended, and so has its Triton.
        assert wait_for(lambda: not before & set(of_repository(stand_in_repository)))
        kept = of_repository(unhurried_repository)
        failed = service.models("set", "qwen", "--repo", str(broken_repository))
        assert failed.returncode == 1
        assert "served as before" in failed.stderr
        assert "the plan is of another release" in failed.stderr
        assert of_repository(unhurried_repository) == kept
        assert service.ask("still here")["choices"][0]["message"]["content"] == "still here"
        assert wait_for(lambda: not of_repository(broken_repository))
        listed = service.models("list", "--json")
        [one] = json.loads(listed.stdout)["models"]["qwen"]["targets"]
        assert (one["name"], one["ready"]) == ("second", True)
        told = service.models("report")
        assert told.returncode == 0, told.stderr
        assert "second" in told.stdout
    finally:
        code = service.stop()
    assert code == 0
    assert not of_repository(unhurried_repository)
