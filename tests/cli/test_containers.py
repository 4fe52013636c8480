"""`--in-container`, with a stand-in for docker on PATH."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import trtqwen
from tests.errors import parse_error
from trtqwen.demo import MODEL

STAND_IN = """#!/bin/bash
if [ "$1" = version ]; then echo "Cannot connect to the Docker daemon" >&2; exit $DAEMON; fi
case $1 in
  version) exit 0;;
  image) [ -z "$DIGEST" ] || echo "$DIGEST"; exit 0;;
esac
echo "$@" > "$(dirname "$0")/called"
trap 'exit 42' INT
[ -z "$WAIT" ] || { echo up; for i in {1..500}; do sleep 0.02; done; }
exit 7
"""
BUILD = ("build", "qwen2-tiny-cpu", "--model", str(MODEL), "--in-container")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH, with the stand-in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script(directory / "docker", STAND_IN)
    return directory


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def with_programs(programs: Path, environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "DAEMON": "0", "WAIT": "", **environment}


def start(programs: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trtqwen", *arguments],
        cwd=programs.parent,
        env=with_programs(programs, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(programs: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    done = trtqwen(*arguments, cwd=programs.parent, env=with_programs(programs, environment))
    return done.returncode, done.stdout, done.stderr


def test_docker_is_run_and_its_exit_code_passed_on(programs: Path) -> None:
    planned = json.loads(run(programs, *BUILD, "--dry-run", "--json")[1])["container"]
    assert not (programs / "called").exists()
    assert not (programs.parent / "engines").exists()
    assert run(programs, *BUILD) == (7, "", "")
    assert "docker " + (programs / "called").read_text().strip() == " ".join(planned[:-1])  # without --json
    assert (programs.parent / "engines").is_dir()
    assert (programs.parent / "triton_repo").is_dir()


def test_options_are_handed_to_the_command_inside(programs: Path) -> None:
    run(programs, *BUILD, "--force", "--no-quality", "--json", "--repo", "out/repo")
    inside = (programs / "called").read_text().split("container_start.sh build ")[1].split()
    home = programs.parent
    assert inside[1:] == [
        f"--model={MODEL}",
        f"--engines={home}/engines",
        f"--repo={home}/out/repo",
        "--no-quality",
        "--force",
        "--json",
    ]


def test_the_image_is_run_by_its_digest_where_docker_knows_it(programs: Path) -> None:
    digest = "nvcr.io/nvidia/tritonserver@sha256:" + "a" * 64
    assert run(programs, *BUILD, DIGEST=digest)[0] == 7
    called = (programs / "called").read_text().split()
    assert called[called.index(digest) + 1].endswith("container_start.sh")
    assert f"--env=TRTQWEN_IMAGE_DIGEST={digest}" in called
    assert "--env=TRTQWEN_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in called


def test_an_image_is_built_on_the_digest(programs: Path) -> None:
    digest = "nvcr.io/nvidia/tritonserver@sha256:" + "a" * 64
    code, output, problem = run(programs, "image", "build", "--output", "context", DIGEST=digest)
    assert code == 1  # the stand-in's pull fails, and nothing is written
    assert "`docker pull nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3` failed" in problem
    assert not (programs.parent / "context").exists()
    script(programs / "docker", STAND_IN.replace("exit 7", "exit 0"))
    code, output, problem = run(programs, "image", "build", "--output", "context", "--json", DIGEST=digest)
    assert (code, json.loads(output)["base"]) == (0, digest), problem
    context = programs.parent / "context"
    lines = (context / "Dockerfile").read_text().splitlines()
    assert f"FROM {digest}" in lines
    for line in lines:
        if line.startswith("COPY "):
            assert (context / line.split()[1]).is_dir()
    assert (context / "trtqwen" / "containers" / "container_start.sh").is_file()
    assert (programs / "called").read_text().split() == ["build", "--tag=trtqwen:1.2.1", "context"]
    code, output, _ = run(programs, "image", "build", "--dry-run")
    assert (code, "FROM nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3\n" in output) == (0, True)
    code, output, problem = run(programs, "image", "build", "--release", "9.9")
    assert (code, "is not a known release" in problem) == (2, True)


def test_selftest_runs_in_a_container(programs: Path) -> None:
    code, output, _ = run(programs, "selftest", "--in-container", "--dry-run")
    assert code == 0
    assert output.startswith("docker run \\\n  --rm \\\n")
    assert "'--gpus=\"device=0\"'" in output
    assert run(programs, "selftest", "--in-container", "--json")[0] == 7
    arguments = (programs / "called").read_text().split("container_start.sh ")[1].split()
    assert arguments == ["selftest", f"--engines={programs.parent}/engines", "--json"]


def test_an_interrupt_reaches_docker(programs: Path) -> None:
    process = start(programs, *BUILD, WAIT="1")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 42


def test_without_docker_or_its_daemon_one_sentence(programs: Path) -> None:
    code, output, problem = run(programs, *BUILD, DAEMON="1")
    assert (code, output) == (1, "")
    assert problem.startswith("error: docker's daemon does not answer (Cannot connect to the Docker daemon)\nhint: ")
    (programs / "docker").unlink()
    code, output, problem = run(programs, *BUILD, PATH=str(programs))
    assert (code, output) == (1, "")
    assert problem.startswith("error: docker is not on PATH\nhint: ")
    assert not (programs.parent / "engines").exists()


def test_the_hosts_driver_is_asked(programs: Path) -> None:
    script(programs / "nvidia-smi", "#!/bin/bash\necho '0, NVIDIA GeForce RTX 4090 D, 8.9, 24564, 1, 575.57.08'\n")
    recipe = "qwen2.5-7b-fp16-tp4-4090d"
    code, output, problem = run(programs, "build", recipe, "--model", str(MODEL), "--in-container", "--dry-run")
    assert (code, output) == (2, "")
    parse_error(problem)
    assert "needs NVIDIA driver 580 or newer, here is 575.57.08" in problem


def test_serve_runs_in_the_container_of_its_recipe(programs: Path) -> None:
    home = programs.parent
    assert run(programs, *BUILD[:-1])[0] == 0
    arguments = ("serve", "qwen2-tiny-cpu", "--in-container", "--http-port", "0", "--log", "triton.log")
    code, output, _ = run(programs, *arguments, "--dry-run")
    assert code == 0
    assert "--network=host \\\n" in output
    assert run(programs, *arguments)[0] == 7
    called = (programs / "called").read_text()
    assert (
        f"source={home}/engines/qwen2-tiny-cpu/engine,target={home}/engines/qwen2-tiny-cpu/engine,readonly" in called
    )
    assert called.split("container_start.sh serve ")[1].split() == [
        f"--repo={home}/triton_repo/qwen2-tiny-cpu",
        "--host=127.0.0.1",
        "--triton-host=127.0.0.1",
        "--http-port=0",
        "--grpc-port=8001",
        "--watchdog=20",
        "--metrics-port=8002",
        "--gateway-port=8080",
        f"--log={home}/triton.log",
    ]
    (home / "keys.yaml").write_text("keys: []\n")
    (home / "gateway.yaml").write_text("api_keys: keys.yaml\nqueue_seconds: 5\n")
    code, output, _ = run(programs, *arguments, "--gateway-config", "gateway.yaml", "--dry-run")
    assert code == 0
    for name in ("keys.yaml", "gateway.yaml"):
        assert f"source={home}/{name},target={home}/{name},readonly" in output
    assert f"--gateway-config={home}/gateway.yaml" in output
    code, output, problem = run(programs, "serve", "--in-container")
    assert (code, output) == (2, "")
    assert "needs a recipe" in problem
    code, output, _ = run(programs, "serve", "qwen2-tiny-cpu", "--dry-run", "--json")
    printed = json.loads(output)
    assert (code, printed["repository"]) == (0, "triton_repo/qwen2-tiny-cpu")
    assert f"--model-repository={home}/triton_repo/qwen2-tiny-cpu" in printed["command"]
