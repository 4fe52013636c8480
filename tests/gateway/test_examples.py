"""The examples of the documentation, run as they are against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import Running

pytestmark = pytest.mark.triton
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, live: Running) -> str:
    """Run an example with the addresses of this server in place of the default ones."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    for address, here in (("http://127.0.0.1:8080", live.gateway.url), ("127.0.0.1:8001", live.triton.grpc_url)):
        source = source.replace(address, here)
    command = ["bash", "-c"] if name.endswith(".sh") else [sys.executable, "-c"]
    environment = os.environ | {"GATEWAY": live.gateway.url}
    done = subprocess.run([*command, source], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["openai_client.py", "triton_client.py"])
def test_a_client_streams_an_answer(live: Running, name: str) -> None:
    assert example(name, live).startswith("Hello! How can I help you?")


def test_curl(live: Running) -> None:
    output = example("curl.sh", live)
    assert "Hello! How can I help you?" in output
    assert "data: [DONE]" in output
    assert "trtqwen_gateway_queued 0.0" in output
