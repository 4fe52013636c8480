"""The report for an issue: complete, and without secrets."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtqwen.cli import app
from trtqwen.report import redacted

SECRETS = [
    "HF_TOKEN=hf_abcdefghijklmnop",
    "export NGC_API_KEY='nvapi-AbCd_1234-xyz987'",
    "Authorization: Bearer abc.def-ghi_jkl012345",
    "api_key: s3cr3t-value",
    '{"password": "hunter two", "user": "x"}',
    "https://me:letmein99@registry.example/v2/",
    "aws_secret_access_key = wJalrXUtnFEMI",
    "sk-proj-0123456789abcdef",
    "eyJhbGciOi.eyJzdWIiOi.SflKxwRJ",
    "keys.yaml: key: abc  # api-key=zzz999",
]
VALUES = [
    "hf_abcdefghijklmnop", "nvapi-AbCd_1234-xyz987", "abc.def-ghi_jkl012345", "s3cr3t-value", "hunter two",
    "me:letmein99", "wJalrXUtnFEMI", "sk-proj-0123456789abcdef", "eyJzdWIiOi", "zzz999",
]  # fmt: skip


@pytest.mark.parametrize(("line", "value"), list(zip(SECRETS, VALUES, strict=True)))
def test_secrets_are_removed(line: str, value: str) -> None:
    assert value not in redacted(f"before {line} after")
    assert "before" in redacted(f"before {line} after")


@pytest.mark.parametrize(
    "line",
    [
        "max_num_tokens=8192 tokens: 12, num_tokens: 3",
        "KV cache of 1,192,608 tokens",
        "[TRT-LLM] [I] Set tokens_per_block to 64.",
        "stop_token_ids: [151645]",
        "tokenizer_dir=/models/x",
        "end_token: 5",
        "digest sha256:0123456789abcdef0123",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redacted(line) == line


def test_a_private_key_is_removed_whole() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nsecondline\n-----END RSA PRIVATE KEY-----"
    assert redacted(f"a\n{key}\nb") == "a\n[removed]\nb"


def test_names_of_user_home_and_host_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpubox7")
    assert redacted("alice@gpubox7:/home/alice/models") == "USER@HOST:~/models"


def test_a_report_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = tmp_path / "engines" / "mine"
    engine.mkdir(parents=True)
    (engine / "build.log").write_text("[TRT] [E] Error Code 2: OutOfMemory (Requested size was 5 bytes.)\n")
    (tmp_path / "engines" / "selftest").mkdir()
    (tmp_path / "engines" / "selftest" / "result.json").write_text('{"ok": true}')
    (tmp_path / "triton.log").write_text("HF_TOKEN=hf_abcdefghijklmnop\n````\nSocket '0.0.0.0:8000' already in use\n")
    runner = CliRunner()
    arguments = ["report", "qwen2.5-7b-bf16-tp4-4090d", "--log", "triton.log", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": "trtqwen-report.md"}
    text = (tmp_path / "trtqwen-report.md").read_text()
    for part in (
        "## Versions",
        "D07 shared memory",
        "## trtqwen plan",
        '"ok": true',
        "Cause: another server listens on the port",
        "Cause: the GPU's memory is not enough",
        "`````text",  # a log with a fence of its own
    ):
        assert part in text
    assert "hf_abc" not in text
    again = runner.invoke(app, arguments)
    assert again.exit_code != 0
    assert runner.invoke(app, [*arguments, "--force"]).exit_code == 0
    missing = runner.invoke(app, ["report", "--log", "none.log", "--output", "other.md"])
    assert "cannot be read" in str(missing.exception)
    assert not (tmp_path / "other.md").exists()
