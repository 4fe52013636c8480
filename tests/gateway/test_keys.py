"""Keys files, guesses, the Host header and the access log, on an application without a server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from trtqwen.diagnostics import InputError
from trtqwen.gateway.admission import auth
from trtqwen.gateway.admission.auth import Authenticator, Guesses, read_keys
from trtqwen.gateway.admission.desk import Desk
from trtqwen.gateway.admission.middleware import Guard
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics

KEY, OTHER = "sk-alice-0123456789", "sk-bob-0123456789abc"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def request(
    guard: Guard, path: str, headers: dict[str, str], address: str = "10.0.0.1"
) -> tuple[int, dict[str, Any]]:
    """Status and state of one request."""
    sent: list[Any] = []
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": (address, 1),
        "state": {"request_id": "r1"},
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], scope["state"]


async def fine(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def guard(authenticator: Authenticator, **settings: Any) -> Guard:
    limits: dict[str, Any] = {"max_header_bytes": 10_000, "max_body_bytes": 10_000, "body_seconds": 5.0}
    limits["desk"] = Desk(1 << 20, 2, 2, 5.0, 10_000)
    return Guard(fine, authenticator, Metrics(), **limits, **settings)


def test_a_key_can_be_stored_as_its_hash(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = read_keys(write(tmp_path / "keys.yaml", f"keys: [{{name: alice, key_sha256: {digest}}}]"))
    assert keys.authenticate(f"Bearer {KEY}").name == "alice"
    with pytest.raises(InputError, match="either key or key_sha256"):
        read_keys(write(tmp_path / "both.yaml", f"keys: [{{name: alice, key: {KEY}, key_sha256: {digest}}}]"))


def test_names_are_not_given_twice_and_others_cannot_write_the_file(tmp_path: Path) -> None:
    text = f"keys: [{{name: alice, key: {KEY}}}, {{name: alice, key: {OTHER}}}]"
    with pytest.raises(InputError, match="two entries have the name alice"):
        read_keys(write(tmp_path / "twice.yaml", text))
    with pytest.raises(InputError, match=r"other users can write it.*chmod 600"):
        read_keys(write(tmp_path / "open.yaml", f"keys: [{{name: alice, key: {KEY}}}]", 0o666))


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_LOOK_SECONDS", 0.0)
    path = write(tmp_path / "keys.yaml", f"keys: [{{name: alice, key: {KEY}, requests_per_minute: 2}}]")
    keys = read_keys(path)
    alice = keys.authenticate(f"Bearer {KEY}")
    write(path, f"keys: [{{name: alice, key: {OTHER}, requests_per_minute: 2}}]")
    with pytest.raises(ApiError, match="not known"):
        keys.authenticate(f"Bearer {KEY}")
    assert keys.authenticate(f"Bearer {OTHER}") is alice  # with the rate that it has used already
    write(path, "keys: nothing")
    assert keys.authenticate(f"Bearer {OTHER}") is alice


def test_who_guesses_keys_waits_and_right_keys_do_not(tmp_path: Path) -> None:
    keys = read_keys(write(tmp_path / "keys.yaml", f"keys: [{{name: alice, key: {KEY}}}]"))
    front = guard(keys)
    statuses = [request(front, "/v1/models", {"Authorization": "Bearer wrong"})[0] for _ in range(25)]
    assert statuses == [401] * 20 + [429] * 5
    assert request(front, "/v1/models", {"Authorization": f"Bearer {KEY}"})[0] == 200
    assert request(front, "/v1/models", {"Authorization": "Bearer wrong"}, "10.0.0.2")[0] == 401
    guesses = Guesses()
    for number in range(20_000):
        guesses.wrong(str(number), 0.0)
    assert len(guesses._buckets) <= 10_000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("[::1]:8080", 200),
        ("evil.example:8080", 421),
        ("gateway", 200),
    ],
)
def test_a_page_bound_to_loopback_is_refused(host: str, status: int) -> None:
    front = guard(Authenticator(), allowed_hosts={"127.0.0.1", "localhost", "[::1]"})
    for path in ("/v1/models", "/", "/metrics"):
        assert request(front, path, {"Host": host})[0] == status


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("127.0.0.1.evil", False)]
)
def test_loopback_is_an_address_and_no_prefix(host: str, loopback: bool, tmp_path: Path) -> None:
    assert GatewayConfig(repository=tmp_path, host=host, allow_anonymous=True).loopback is loopback


def test_the_access_log_says_who_and_how_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = read_keys(write(tmp_path / "keys.yaml", f"keys: [{{name: alice, key: {KEY}}}]"))
    front = guard(keys, access_log=True, protect_metrics=True)
    with caplog.at_level(logging.INFO, "trtqwen.access"):
        request(front, "/v1/models", {"Authorization": f"Bearer {KEY}"})
        request(front, "/v1/models", {})
        request(front, "/health", {})
        assert request(front, "/metrics", {})[0] == 401
    entries = [json.loads(record.message) for record in caplog.records if record.name == "trtqwen.access"]
    assert [(entry["key"], entry["path"], entry["status"]) for entry in entries] == [
        ("alice", "/v1/models", 200),
        (None, "/v1/models", 401),
    ]
    assert all(entry["request_id"] == "r1" and entry["address"] == "10.0.0.1" for entry in entries)
    assert KEY not in caplog.text


def test_requests_are_counted_by_key_without_an_access_log(tmp_path: Path) -> None:
    keys = read_keys(write(tmp_path / "keys.yaml", f"keys: [{{name: alice, key: {KEY}}}]"))
    counted = guard(keys, access_log=False)
    for authorization in (KEY, KEY, "wrong-secret-key-000"):
        request(counted, "/v1/models", {"Authorization": f"Bearer {authorization}"})
    text = counted._metrics.text().decode()
    assert 'trtqwen_gateway_key_requests_total{key="alice",status="200"} 2.0' in text
    assert 'trtqwen_gateway_key_requests_total{key="-",status="401"} 1.0' in text
