"""Real gateways in front of real Tritons: one with the bundled model's engine, one with a stand-in that obeys."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from scripts.stand_in_engine import write_stand_in_repository
from tests.conftest import GATEWAYS
from tests.ranks import Nursery
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.process import GatewayProcess
from trtqwen.triton.ports import Ports
from trtqwen.triton.server import TritonServer

# After the template of Qwen2.5-Instruct, without its default system prompt.
TOOLS_TEMPLATE = (Path(__file__).parent / "data" / "qwen_tools.jinja").read_text(encoding="utf-8")


@dataclass
class Running:
    """A gateway, and the Triton behind it."""

    gateway: GatewayProcess
    triton: TritonServer
    model: str = field(default="qwen", init=False)
    key: str = "none"

    @property
    def client(self) -> Any:  # untyped: tests send fields that the client's types do not know
        return openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def ask(self, text: str, **options: Any) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of a chat, by a client that checks nothing."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **options}
        status, headers, content = self.post("/v1/chat/completions", body)
        return status, headers, json.loads(content)

    def chat(self, text: str, **options: Any) -> Any:
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    @property
    def repository(self) -> Path:
        """The repository that it serves."""
        repository = self.gateway.config.repository
        assert repository is not None
        return repository

    @property
    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of an answer, by a client that checks nothing."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.config.port, timeout=60)
        try:
            connection.request("POST", path, content, self._headers | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.config.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.gateway.config.port), timeout=10)

    @property
    def resident_mb(self) -> float:
        """Memory of the gateway's process."""
        pages = int(Path(f"/proc/{self.gateway.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def metric(self, name: str) -> float:
        """A gateway metric, the sum over its labels' values."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def used_blocks(self) -> float:
        """KV cache blocks in use, as the engine tells Triton."""
        with urllib.request.urlopen(f"http://{self.triton.metrics_url}/metrics", timeout=30) as answer:
            [line] = [line for line in answer.read().decode().splitlines() if 'block_type="used"' in line]
        return float(line.split()[-1])


@contextmanager
def access_log(path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Reads what gateways write to their access log, which is this process's standard error, as it grows.

    pytest's own capture loses what comes while it is read.
    """
    before = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        lines = re.compile(r'\{"time".*(?=\n)')
        yield lambda: [json.loads(line) for line in lines.findall(path.read_text())]
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.fixture(scope="session")
def engine_repository(served_repository: Path) -> Path:
    """The bundled model: 16 requests in the batch, 512 tokens each."""
    return served_repository


@pytest.fixture(scope="session")
def stand_in_repository(engine_repository: Path) -> Path:
    """Its copy with an engine that obeys, a template with tools, and guided decoding on paper."""
    output = engine_repository.with_name("stand-in")
    write_stand_in_repository(
        engine_repository, output, step_ms=1, chat_template=TOOLS_TEMPLATE, guided_decoding_backend="xgrammar"
    )
    return output


@pytest.fixture(scope="session")
def unhurried_repository(engine_repository: Path) -> Path:
    """The same at 100 tokens a second: a long answer is not done when somebody is killed, on any machine."""
    output = engine_repository.with_name("unhurried")
    write_stand_in_repository(engine_repository, output, step_ms=10)
    return output


@contextmanager
def quick_triton(repository: Path) -> Iterator[TritonServer]:
    """A Triton that is not asked to leave politely: nothing of it is needed afterwards."""
    with TritonServer(repository, ports=Ports(0, 0, 0)) as triton:
        group = triton.pid
        try:
            yield triton
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


_NURSERY = Nursery(*GATEWAYS)  # ends with the process of the tests


@contextmanager
def quick_gateway(
    server: TritonServer, repository: Path, *, forked: bool = True, **settings: Any
) -> Iterator[Running]:
    """A gateway in front of a Triton.

    Args:
        forked: fork it from a process that has imported it. One with several workers is started as users do.
    """
    config = {"repository": repository, "triton": (server.grpc_url,), "port": 0, "model_name": "qwen"}
    gateway = GatewayProcess(GatewayConfig(**{**config, **settings}))
    try:
        with pytest.MonkeyPatch.context() as patch:
            if forked and gateway.config.num_workers == 1:
                patch.setattr("trtqwen.gateway.process.start_guarded", _NURSERY.start_guarded)
            gateway.start()
        gateway.wait_until_ready(behind=server)  # the end of the server is told as such
        yield Running(gateway, server)
    finally:
        gateway.stop()


@pytest.fixture(scope="session")
def live(served: TritonServer, engine_repository: Path) -> Iterator[Running]:
    """A gateway in front of the bundled model, started as users do."""
    with quick_gateway(served, engine_repository, forked=False) as running:
        yield running


@pytest.fixture(scope="session")
def stand_in_triton(stand_in_repository: Path) -> Iterator[TritonServer]:
    with quick_triton(stand_in_repository) as triton:
        yield triton


@pytest.fixture(scope="session")
def obedient(stand_in_repository: Path, stand_in_triton: TritonServer) -> Iterator[Running]:
    """A gateway in front of the stand-in, started as users do."""
    with quick_gateway(stand_in_triton, stand_in_repository, forked=False) as running:
        yield running


@pytest.fixture
def another_gateway(stand_in_repository: Path, stand_in_triton: TritonServer) -> Iterator[Callable[..., Running]]:
    """Starts gateways in front of the stand-in with other settings."""
    with ExitStack() as started:
        yield lambda **settings: started.enter_context(
            quick_gateway(stand_in_triton, stand_in_repository, **settings)
        )
