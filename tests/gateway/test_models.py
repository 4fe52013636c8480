"""Several models, swaps, canaries and shadows on real Tritons: the bundled model in float32 and in INT8."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import BACKEND
from tests.gateway.conftest import Running, access_log, quick_triton
from tests.gateway.test_fleet import within
from tests.waiting import wait_for
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.process import GatewayProcess
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(BACKEND != "torch", reason="compares two engines of the embedded backend"),
]
ADMIN, ALICE, BOB = "sk-admin-0123456789", "sk-alice-0123456789", "sk-bob-01234567890"


@pytest.fixture(scope="module")
def int8_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("int8")
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="bfloat16", quant="int8_wo")), home / "checkpoint")
    recipe = EngineRecipe(
        backend="torch", max_batch_size=16, max_num_tokens=512, max_seq_len=512, tokens_per_block=16
    )
    build_engine(home / "checkpoint", recipe, home / "engine")
    write_repository(home / "engine", ServeRecipe(triton_max_batch_size=8), home / "int8")
    return home / "int8"


@dataclass
class Fleet(Running):
    """A gateway with a table of models, and the Tritons behind it."""

    table: Path = Path()
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def admin(self, method: str, path: str, body: Any = None, key: str = ADMIN, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.config.port, timeout=120)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **headers}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def serve(self, *targets: dict[str, Any], name: str = "qwen", **more: Any) -> None:
        """Have a model served by targets; wait until nothing drains."""
        status, answer = self.admin("PUT", f"/admin/models/{name}", {"targets": list(targets), **more})
        assert status == 200, answer
        assert wait_for(lambda: bool(self.admin("GET", "/admin/models")[1]["settled"]))

    def target(self, name: str, **more: Any) -> dict[str, Any]:
        return {**self.targets[name], **more}

    def fingerprint(self, **options: Any) -> str:
        status, _, answer = self.ask("hello", max_tokens=1, **options)
        assert status == 200, answer
        return str(answer["system_fingerprint"])

    def counts(self, name: str) -> dict[str, float]:
        """Values of a metric by its labels."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
        return {line.partition("{")[2].rpartition("}")[0]: float(line.rpartition(" ")[2]) for line in lines}


@contextmanager
def fleet(home: Path, tritons: dict[str, tuple[Path, TritonServer]], **settings: Any) -> Iterator[Fleet]:
    """A gateway whose model `qwen` is served by the first of some targets."""
    targets = {
        name: {"name": name, "repository": str(repository), "triton": [triton.grpc_url]}
        for name, (repository, triton) in tritons.items()
    }
    table, admins = home / "models.yaml", home / "admins.yaml"
    first = next(iter(targets))
    table.write_text(yaml.safe_dump({"models": {"qwen": {"targets": [targets[first]]}}}))
    admins.write_text(f"keys:\n  - {{name: operator, key: {ADMIN}}}\n")
    config = GatewayConfig(models=table, admin_keys=admins, port=0, **settings)
    with GatewayProcess(config) as gateway:
        yield Fleet(gateway, tritons[first][1], table=table, targets=targets)


@pytest.fixture(scope="module")
def tritons(
    engine_repository: Path,
    served: TritonServer,
    int8_repository: Path,
    stand_in_repository: Path,
    stand_in_triton: TritonServer,
) -> Iterator[dict[str, tuple[Path, TritonServer]]]:
    with quick_triton(int8_repository) as int8:
        yield {
            "float32": (engine_repository, served),
            "int8": (int8_repository, int8),
            "obedient": (stand_in_repository, stand_in_triton),
        }


@pytest.fixture(scope="module")
def shared(
    tritons: dict[str, tuple[Path, TritonServer]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("fleet"), tritons, throttle_seconds=None) as running:
        yield running


@pytest.fixture
def service(shared: Fleet) -> Iterator[Fleet]:
    """The gateway with one model in float32."""
    yield shared
    for name in shared.admin("GET", "/admin/models")[1]["models"]:
        if name != "qwen":
            assert shared.admin("DELETE", f"/admin/models/{name}")[0] == 200
    shared.serve(shared.target("float32"))


class Load:
    """Clients that ask one after another until they are told to stop; each answer must be whole."""

    def __init__(self, running: Fleet, clients: int = 2) -> None:
        self._running = running
        self._stop = threading.Event()
        self.wrong: list[Any] = []
        self.fingerprints: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def _ask(self, number: int) -> None:
        options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
        while not self._stop.wait(0.1):  # less than all of the machine: the swap needs some
            if number % 2:
                status, _, answer = self._running.ask("tell me a story", **options)
                if status != 200 or answer["usage"]["completion_tokens"] != 24:
                    self.wrong.append((status, answer))
                    continue
                self.fingerprints.append(answer["system_fingerprint"])
            else:
                body = {"model": "qwen", "messages": [{"role": "user", "content": "tell me"}], "stream": True}
                status, _, text = self._running.post("/v1/chat/completions", {**body, **options})
                if status != 200 or not text.endswith("data: [DONE]\n\n") or '"error"' in text:
                    self.wrong.append((status, text))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_more(self, count: int = 6) -> None:
        before = len(self.fingerprints)
        assert wait_for(lambda: len(self.fingerprints) >= before + count or bool(self.wrong))


def test_a_swap_under_load_loses_no_request(service: Fleet) -> None:
    old = service.fingerprint()
    with Load(service) as load:
        load.wait_for_more()
        service.serve(service.target("int8"))
        new = service.fingerprint()
        load.wait_for_more()
        service.serve(service.target("float32"))
        load.wait_for_more()
    assert not load.wrong, load.wrong[0]
    assert new != old
    assert set(load.fingerprints) == {old, new}
    assert service.fingerprint() == old


def test_each_model_answers_by_its_name(service: Fleet) -> None:
    status, answer = service.admin(
        "PUT", "/admin/models/small", {"targets": [service.target("int8")], "aliases": ["gpt-4o-mini"]}
    )
    assert status == 200, answer
    listed = json.loads(service.get("/v1/models")[1])["data"]
    assert [model["id"] for model in listed] == ["qwen", "small"]
    assert json.loads(service.get("/ready")[1])["models"] == {"qwen": True, "small": True}
    stable = service.fingerprint()
    for name in ("small", "gpt-4o-mini"):
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        status, _, text = service.post("/v1/chat/completions", body)
        answer = json.loads(text)
        assert (status, answer["model"]) == (200, "small")
        assert answer["system_fingerprint"] != stable
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"):
        body = {"model": "absent", "messages": [], "prompt": "x", "input": "x", "max_tokens": 1}
        status, _, text = service.post(path, {**body, "messages": [{"role": "user", "content": "hi"}]})
        assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found"), path
    assert service.admin("DELETE", "/admin/models/small")[0] == 200
    status, _, text = service.post("/v1/completions", {"model": "small", "prompt": "x", "max_tokens": 1})
    assert status == 404


def test_a_repository_that_does_not_load_changes_nothing(service: Fleet, tmp_path: Path) -> None:
    before, old = service.table.read_text(), service.fingerprint()
    (tmp_path / "empty").mkdir()
    for broken, says in (
        ({"name": "next", "repository": str(tmp_path / "empty"), "triton": ["127.0.0.1:1"]}, str(tmp_path / "empty")),
        ({"name": "next", "repository": "/nowhere"}, "nowhere"),
    ):
        status, answer = service.admin("PUT", "/admin/models/qwen", {"targets": [broken]})
        assert (status, answer["error"]["code"]) == (422, "model_not_changed")
        assert says in answer["error"]["message"]
        assert "served as before" in answer["error"]["message"]
    assert yaml.safe_load(service.table.read_text()) == yaml.safe_load(before)
    assert service.fingerprint() == old
    assert service.admin("GET", "/admin/models/qwen")[1]["state"] == "serving"


def test_a_triton_that_does_not_answer_changes_nothing(
    tritons: dict[str, tuple[Path, TritonServer]], tmp_path: Path
) -> None:
    with fleet(tmp_path, {"float32": tritons["float32"]}, engine_start_seconds=1) as running:
        silent = {"name": "next", "repository": str(tritons["int8"][0]), "triton": ["127.0.0.1:9"]}
        status, answer = running.admin("PUT", "/admin/models/qwen", {"targets": [silent]})
        assert status == 422
        assert "127.0.0.1:9" in answer["error"]["message"]
        assert running.ask("hello", max_tokens=1)[0] == 200


def test_an_edited_file_is_followed_and_a_broken_one_is_not(service: Fleet) -> None:
    old = service.fingerprint()
    service.table.write_text("models: [")
    assert wait_for(lambda: service.admin("GET", "/admin/models")[1]["problem"] is not None)
    assert service.fingerprint() == old
    service.table.write_text(yaml.safe_dump({"models": {"qwen": {"targets": [service.target("int8")]}}}))
    assert wait_for(lambda: service.fingerprint() != old)


def test_changes_from_an_old_revision_are_refused(service: Fleet) -> None:
    revision = service.admin("GET", "/admin/models")[1]["revision"]
    entry = {"targets": [service.target("float32"), service.target("int8", weight=0)]}
    assert service.admin("PUT", "/admin/models/qwen", entry, **{"If-Match": revision})[0] == 200
    status, answer = service.admin("PUT", "/admin/models/qwen", entry, **{"If-Match": revision})
    assert (status, answer["error"]["code"]) == (412, "revision_changed")


def test_only_the_admin_key_opens_the_admin_routes(service: Fleet, obedient: Running, tmp_path: Path) -> None:
    with access_log(tmp_path / "access.log") as entries:
        assert service.admin("GET", "/admin/models", key="sk-none-0123456789ab")[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", service.gateway.config.port, timeout=30)
        connection.request("PUT", "/admin/models/qwen", "{}")
        assert connection.getresponse().status == 401
        assert obedient.get("/admin/models")[0] == 404
        assert service.admin("PUT", "/admin/models/qwen", {"targets": []})[0] == 400
        assert wait_for(lambda: any(entry["key"] == "operator" and entry["status"] == 400 for entry in entries()))
        assert {(entry["path"], entry["status"]) for entry in entries()} >= {("/admin/models", 401)}


def test_a_canary_gets_its_share_and_keeps_its_users(service: Fleet) -> None:
    old = service.fingerprint()
    targets = service.target("float32", weight=70), service.target("int8", weight=30)
    service.serve(*targets, sticky="user")
    answers = {str(user): service.fingerprint(user=str(user)) for user in range(60)}
    canary = {user for user, fingerprint in answers.items() if fingerprint != old}
    assert within(len(canary), 60, 0.3)
    for user in [*sorted(canary)[:5], *sorted(answers.keys() - canary)[:5]]:
        assert service.fingerprint(user=user) == answers[user]
    service.serve(service.target("float32", weight=40), service.target("int8", weight=60), sticky="user")
    assert all(service.fingerprint(user=user) != old for user in sorted(canary)[:10])
    service.serve(*targets, sticky="none")
    spread = Counter(service.fingerprint(user="1") for _ in range(60))
    assert within(60 - spread[old], 60, 0.3)


@pytest.mark.slow
def test_a_canary_that_has_died_gets_nothing(service: Fleet, int8_repository: Path) -> None:
    with quick_triton(int8_repository) as doomed:
        canary = {"name": "doomed", "repository": str(int8_repository), "triton": [doomed.grpc_url]}
        service.serve(service.target("float32", weight=1), {**canary, "weight": 9}, sticky="none")
        # A busy machine can hide the canary from one look at its health.
        assert wait_for(lambda: len({service.fingerprint() for _ in range(40)}) == 2)
        os.killpg(doomed.pid, signal.SIGKILL)
        up = f'replica="{doomed.grpc_url}"'
        assert wait_for(lambda: service.counts("trtqwen_gateway_replica_up")[up] == 0)
        assert len({service.fingerprint() for _ in range(20)}) == 1
        assert json.loads(service.get("/ready")[1])["status"] == "ready"


def plain(answer: Any) -> Any:
    """An answer without what differs between any two."""
    return {key: value for key, value in answer.items() if key not in ("id", "created", "seed")}


def copies(service: Fleet, target: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for labels, value in service.counts("trtqwen_gateway_shadow_answers_total").items():
        if f'target="{target}"' in labels:
            found[labels.partition('result="')[2].partition('"')[0]] += int(value)
    return found


def test_a_shadow_sees_copies_and_clients_see_nothing(service: Fleet) -> None:
    questions = [f"tell me about {number}" for number in range(12)]
    ask: Callable[[str], Any] = lambda text: service.ask(text, max_tokens=12, temperature=0)[2]  # noqa: E731
    alone = [plain(ask(text)) for text in questions]
    tokens = service.metric("trtqwen_gateway_output_tokens_total")
    service.serve(service.target("float32"), service.target("int8", shadow=1))
    shadowed = [plain(ask(text)) for text in questions]
    assert shadowed == alone
    assert wait_for(lambda: sum(copies(service, "int8").values()) == 12)
    found = copies(service, "int8")
    assert found["same"] + found["different"] == 12
    told = sum(answer["usage"]["completion_tokens"] for answer in shadowed)
    assert service.metric("trtqwen_gateway_output_tokens_total") - tokens == told  # a shadow's are not the service's
    [report] = [one for one in service.admin("GET", "/admin/report")[1]["models"] if one["model"] == "qwen"]
    shadow = next(one for one in report["targets"] if one["role"] == "shadow")
    assert (shadow["target"], shadow["outcomes"]["answered"]) == ("int8", 12)
    assert shadow["copies"]["greedy"] == {key: value for key, value in found.items() if value}
    assert 0 <= shadow["agreement"] <= 1
    assert shadow["times"]["first_token"]["count"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("disease", [signal.SIGSTOP, signal.SIGKILL])
def test_a_shadow_that_hangs_or_dies_disturbs_nobody(
    service: Fleet, stand_in_repository: Path, disease: signal.Signals
) -> None:
    with quick_triton(stand_in_repository) as ill:
        name = f"ill-{disease.name}"
        shadow = {"name": name, "repository": str(stand_in_repository), "triton": [ill.grpc_url]}
        service.serve(service.target("float32"), {**shadow, "shadow": 1})
        os.killpg(ill.pid, disease)
        begun = time.monotonic()
        for _ in range(30):
            status, _, answer = service.ask("hello", max_tokens=4)
            assert status == 200, answer
        assert time.monotonic() - begun < 45  # far less than the deadline of one request
        assert wait_for(lambda: copies(service, name)["skipped"] > 0)
        assert copies(service, name)["same"] == 0
        service.serve(service.target("float32"))


@pytest.mark.slow
def test_keys_stay_with_their_target_and_workers_agree(
    tritons: dict[str, tuple[Path, TritonServer]], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    names = [f"user{number}" for number in range(12)]
    entries = [{"name": name, "key": f"sk-{name}-0123456789"} for name in names]
    keys.write_text(yaml.safe_dump({"keys": entries}))
    chosen = {name: tritons[name] for name in ("float32", "int8")}
    with fleet(tmp_path, chosen, workers=2, api_keys=keys) as running:
        running.key = f"sk-{names[0]}-0123456789"
        old = running.fingerprint()
        assert running.admin("GET", "/admin/models", key=running.key)[0] == 401
        assert running.post("/v1/chat/completions", {}, {"Authorization": f"Bearer {ADMIN}"})[0] == 401
        with Load(running) as load:
            load.wait_for_more()
            running.serve(running.target("int8"))
            assert {running.fingerprint() for _ in range(12)} == {running.fingerprint()} != {old}
            load.wait_for_more()
        assert not load.wrong, load.wrong[0]
        running.serve(running.target("float32", weight=1), running.target("int8", weight=1))
        answers: dict[str, set[str]] = {}
        for name in names * 4:
            running.key = f"sk-{name}-0123456789"
            answers.setdefault(name, set()).add(running.fingerprint())
        assert {len(found) for found in answers.values()} == {1}
        assert len(set.union(*answers.values())) == 2
        assert wait_for(lambda: running.metric("trtqwen_gateway_in_flight") == 0)
