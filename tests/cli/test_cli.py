"""The command line as a user meets it: a process, its output and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import trtqwen
from tests.errors import parse_error
from tests.processes import descendants
from tests.slow import SLOW
from tests.waiting import wait_for
from trtqwen.artifact.manifest import read_manifest
from trtqwen.demo import MODEL
from trtqwen.gateway.config import GatewayConfig


def refused(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    """One clear sentence on standard error, nothing on standard output."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    message = "; ".join(parse_error(result.stderr))
    for part in parts:
        assert part in message


def test_help_names_every_command() -> None:
    result = trtqwen("--help")
    assert result.returncode == 0
    for command in ("demo", "convert", "build", "repo", "serve", "infer"):
        assert command in result.stdout


def test_convert_prints_json_on_request(tmp_path: Path) -> None:
    result = trtqwen("convert", MODEL, "-o", tmp_path / "out", "--tp", 2, "--json")
    assert result.returncode == 0
    printed = json.loads(result.stdout)
    assert (printed["dtype"], printed["tp_size"], len(printed["ranks"])) == ("bfloat16", 2, 2)
    sizes = sum((tmp_path / "out" / rank["file"]).stat().st_size for rank in printed["ranks"])
    assert 0 < sizes - printed["bytes"] < 20_000  # headers
    assert printed["seconds"] > 0


def test_convert_takes_settings_from_a_recipe_and_flags_win(tmp_path: Path) -> None:
    arguments = ("convert", MODEL, "-o", tmp_path / "out", "--recipe", "qwen2-tiny-cpu", "--dry-run", "--json")
    printed = json.loads(trtqwen(*arguments).stdout)
    assert (printed["dtype"], printed["tp_size"]) == ("float32", 2)
    printed = json.loads(trtqwen(*arguments, "--tp", 4, "--dtype", "float16").stdout)
    assert (printed["dtype"], printed["tp_size"]) == ("float16", 4)
    assert not (tmp_path / "out").exists()


def test_build_and_its_dry_run(tmp_path: Path) -> None:
    arguments = ("build", "qwen2-tiny-cpu", "--model", MODEL, "--json")
    stages = json.loads(trtqwen(*arguments, "--dry-run", cwd=tmp_path).stdout)["stages"]
    assert [stage["up_to_date"] for stage in stages] == [False, False, False]
    assert list(tmp_path.iterdir()) == []
    built = json.loads(trtqwen(*arguments, cwd=tmp_path).stdout)["stages"]
    assert [stage["directory"] for stage in built] == [stage["directory"] for stage in stages]
    assert read_manifest(tmp_path / "triton_repo" / "qwen2-tiny-cpu", "repository")
    stages = json.loads(trtqwen(*arguments, "--dry-run", cwd=tmp_path).stdout)["stages"]
    assert [stage["up_to_date"] for stage in stages] == [True, True, True]


def test_repo_writes_the_repository_of_an_engine(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    result = trtqwen("repo", bundled_engine(2), "-o", tmp_path / "repo")
    assert result.returncode == 0
    assert f"trtqwen serve --repo {tmp_path / 'repo'}" in result.stdout.replace("\n", "")
    refused(trtqwen("repo", bundled_engine(2), "-o", tmp_path / "repo"), "exists; pass --force")
    assert trtqwen("repo", bundled_engine(2), "-o", tmp_path / "repo", "--force").returncode == 0


def test_the_4090d_recipe_without_trtllm_build(tmp_path: Path) -> None:
    recipe = tmp_path / "short.yaml"
    text = (Path(__file__).parents[2] / "recipes" / "qwen2.5-7b-fp16-tp4-4090d.yaml").read_text()
    recipe.write_text(text.replace("max_seq_len: 32768", "max_seq_len: 2048"))  # what the bundled model carries
    result = trtqwen("build", recipe, "--model", MODEL, cwd=tmp_path)
    assert result.returncode == 1
    assert "trtllm-build is not on this machine: the checkpoint is written" in result.stderr
    assert read_manifest(tmp_path / "engines" / "short" / "checkpoint", "checkpoint").parameters["tp_size"] == 4


def test_a_path_that_the_system_refuses_gets_one_sentence(tmp_path: Path) -> None:
    refused(trtqwen("plan", "a" * 300), "cannot be read or written (File name too long); correct the path")
    (tmp_path / "loop").symlink_to("loop")
    refused(trtqwen("plan", "qwen2-tiny-cpu", "--model", tmp_path / "loop"), "no such directory")


def test_a_terminal_without_the_characters_gets_what_it_can_show() -> None:
    command = [sys.executable, "-m", "trtqwen", "plan", "qwen2.5-7b-bf16-tp4-4090d"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "? KV cache" in result.stdout


def test_a_full_disk_is_a_failure_in_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "trtqwen", "recipe", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert parse_error(result.stderr) == ("No space left on device", "free some space, or choose another disk")


def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(trtqwen("convert", tmp_path / "none", *out), "no such directory")
    refused(trtqwen("convert", tmp_path / "empty", *out), "has no config.json")
    refused(
        trtqwen("convert", MODEL, *out, "--tp", 3), "tp_size 3: does not divide the attention heads", "1, 2, 4, 8"
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused(trtqwen("convert", MODEL, "-o", tmp_path / "taken"), "exists; pass --force")
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("description: d\nengine:\n  backend: torch\n  batch: 1\n")
    refused(trtqwen("build", recipe, "--model", MODEL), "bad.yaml", "field 'engine.batch' is unknown")
    refused(trtqwen("build", "nope", "--model", MODEL), "no such recipe")
    refused(trtqwen("serve", "--repo", tmp_path / "empty"), "is not a finished repository")
    refused(trtqwen("serve", cwd=tmp_path), "holds no repository")
    refused(
        trtqwen("gateway"), "gateway: either a repository or a table of models is needed", "give --repo or --models"
    )
    refused(trtqwen("gateway", "--repo", tmp_path / "empty", "--port", 0), "is not a finished repository")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("convert",), ("convert", MODEL, "-o", "x", "--dtype", "int3"), ("nope",)])
def test_bad_usage_has_exit_code_2(arguments: tuple[object, ...]) -> None:
    assert trtqwen(*arguments).returncode == 2


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(trtqwen("convert", MODEL, "-o", tmp_path / "file" / "out"), "cannot be created")


def test_every_setting_of_the_gateway_is_told() -> None:
    told = trtqwen("gateway", "--help").stdout
    assert [name for name in GatewayConfig.model_fields if name not in told] == []


def test_triton_asks_for_no_keys_and_stays_on_loopback(repository: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.touch(mode=0o600)
    keys.write_text("keys: [{name: a, key: 0123456789abcdef}]\n")
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0, "--gateway-port", 0)
    on_triton = ("serve", "--repo", repository, *ports)
    serve = (*on_triton, "--host", "0.0.0.0", "--dry-run")
    shown = trtqwen(*serve, "--api-keys", keys).stdout
    assert {word for word in shown.split() if "address=" in word} == {
        f"--{endpoint}-address=127.0.0.1" for endpoint in ("http", "grpc", "metrics")
    }
    assert "--grpc-address=0.0.0.0" in trtqwen(*serve, "--triton-host", "0.0.0.0").stdout
    refused(trtqwen(*serve, "--no-gateway"), "is the gateway's address", "--triton-host")
    refused(trtqwen(*on_triton, "--triton-host", "::1"), "::1: Triton takes no IPv6 address")
    keys.write_text("keys: [{name: a, key: short}]\n")
    refused(trtqwen("serve", "--repo", repository, "--grpc-port", 0, "--api-keys", keys), "at least 16 characters")


def test_infer_without_a_server_fails_in_one_sentence() -> None:
    refused(trtqwen("infer", "hi", "--url", "127.0.0.1:9"), "127.0.0.1:9: no Triton server answers", code=1)


@pytest.fixture(scope="module")
def repository(bundled_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("cli") / "repository"
    assert trtqwen("repo", bundled_engine(1), "-o", repository).returncode == 0
    return repository


def gone(family: list[int]) -> bool:
    """Whether all have ended: a guardian ends when it sees the end of the process that it watches."""
    return wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family))


def started(*arguments: object) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A command that runs, and the JSON object that it has printed."""
    command = [sys.executable, "-m", "trtqwen", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        text += line
    return process, json.loads(text)


def fetched(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as problem:
        return problem.code, problem.read().decode()


@pytest.mark.triton
def test_serve_answers_and_stops_cleanly(repository: Path, tmp_path: Path) -> None:
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0, "--gateway-port", 0)
    server, endpoints = started("serve", "--repo", repository, *ports, "--model-name", "small")
    assert json.loads(fetched(f"{endpoints['gateway']}/v1/models")[1])["data"][0]["id"] == "small"
    settings = tmp_path / "gateway.yaml"
    settings.write_text("port: 0\nprobe_seconds: 1.5\nmodel_name: alone\n")
    alone, printed = started("gateway", "--repo", repository, "--triton", endpoints["grpc"], "--config", settings)
    assert wait_for(lambda: fetched(f"{printed['gateway']}/ready")[0] == 200)
    assert fetched(f"{printed['gateway']}/v1/models/alone")[0] == 200
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(timeout=60) == 0
    family = descendants(server.pid)
    assert len(family) >= 4  # tritonserver, its text models, the engine
    answer = trtqwen("infer", "你好", "--url", endpoints["grpc"], "--max-tokens", 16)
    assert answer.returncode == 0
    assert answer.stdout.strip()
    told = json.loads(trtqwen("infer", "你好", "--url", endpoints["grpc"], "--max-tokens", 16, "--json").stdout)
    assert told["text"].strip() == answer.stdout.strip()
    assert 0 < told["tokens"] <= 16
    taken = endpoints["grpc"].rpartition(":")[2]
    refused(trtqwen("serve", "--repo", repository, "--grpc-port", taken), taken, "is in use", "--grpc-port")
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    assert gone(family)


@SLOW
@pytest.mark.triton
def test_serve_ends_with_a_sentence_when_a_rank_dies(repository: Path) -> None:
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0, "--gateway-port", 0)
    server, _ = started("serve", "--repo", repository, *ports)
    family = descendants(server.pid)
    [rank] = [pid for pid in family if "trtqwen.executor.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(rank, signal.SIGKILL)
    try:
        assert server.wait(timeout=60) == 1
    finally:
        server.terminate()
    assert server.stderr is not None
    problem = " ".join(server.stderr.read().split())
    assert "the engine has stopped (rank 0 ended with code -9" in problem
    assert "start the server again" in problem
    assert gone(family)


@pytest.mark.triton
def test_serve_can_be_interrupted_while_it_starts(repository: Path) -> None:
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--gateway-port", "0")
    command = [sys.executable, "-m", "trtqwen", "serve", "--repo", str(repository), *ports]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    assert "starting Triton" in server.stderr.readline()
    assert wait_for(lambda: bool(descendants(server.pid)))
    family = descendants(server.pid)
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0
    assert gone(family)


def test_a_port_in_use_is_refused_before_anything_starts(repository: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        refused(trtqwen("serve", "--repo", repository, "--http-port", port), str(port), "is in use", "--http-port")
    ports = ("--http-port", port, "--grpc-port", 0, "--metrics-port", 0, "--gateway-port", port)
    refused(trtqwen("serve", "--repo", repository, *ports), "the gateway cannot listen there")


def test_a_killed_build_is_not_served(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (copy / "manifest.json").unlink()
    refused(trtqwen("serve", "--repo", copy), "is not a finished repository")


@pytest.mark.parametrize("module", ["typer", "yaml"])  # of the command line itself, and of the command
def test_ctrl_c_during_the_imports_is_quiet(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "trtqwen", "plan", "qwen2-tiny-cpu"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
