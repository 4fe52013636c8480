"""`trtqwen build` as a user meets it: what it keeps, what it waits for, and what a dry run says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.errors import parse_error
from tests.slow import every
from tests.waiting import wait_for
from trtqwen.artifact.directory import finished_directory, locked
from trtqwen.cli import COMMANDS, app
from trtqwen.demo import MODEL
from trtqwen.diagnostics import OutputError
from trtqwen.recipe import load_recipe, recipe_names
from trtqwen.system.processes import stopped

BUILD = [sys.executable, "-m", "trtqwen", "build", "qwen2-tiny-cpu", "--model", str(MODEL)]


def start(*command: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")}


def test_two_builds_at_once_one_waits_and_says_so(tmp_path: Path) -> None:
    with locked(tmp_path / "engines" / ".qwen2-tiny-cpu.build", lambda pid: None):
        second = start(*BUILD, "--json", cwd=tmp_path)
        assert second.stderr is not None
        assert second.stderr.readline() == f"waiting for another build (pid {os.getpid()})\n"
    first = start(*BUILD, "--json", cwd=tmp_path)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    made = [[not stage["reused"] for stage in json.loads(output)["stages"]] for output, _ in outputs]
    assert sorted(made) == [[False] * 3, [True] * 3]


def test_of_two_conversions_to_one_directory_one_is_refused_in_a_sentence(tmp_path: Path) -> None:
    convert = [sys.executable, "-m", "trtqwen", "convert", MODEL, "-o", tmp_path / "out"]
    with finished_directory(tmp_path / "out") as directory:
        (directory / "file").touch()
        loser = start(*convert, cwd=tmp_path)
        output, problem = loser.communicate(timeout=60)
    assert (loser.returncode, output) == (2, "")
    what, hint = parse_error(problem)
    assert what.endswith("is writing it")
    assert hint.startswith("wait until that is done")
    assert (tmp_path / "out" / "file").exists()


def test_a_build_says_why_it_makes_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "recipes" / "qwen2-tiny-cpu.yaml").read_text()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    run = ["build", str(recipe), "--model", str(MODEL)]
    assert CliRunner().invoke(app, run).output.count("because it is missing") == 3
    assert CliRunner().invoke(app, run).output.count(": up to date\n") == 3
    recipe.write_text(text.replace("max_queue_size: 256", "max_queue_size: 9"))
    assert "would be made, because serve.max_queue_size changed from 256 to 9" in dry(run)
    output = CliRunner().invoke(app, run).output
    assert output.count(": up to date\n") == 2
    assert output.count("because serve.max_queue_size changed from 256 to 9\n") == 1


def dry(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", every(3, recipe_names()))
def test_a_dry_run_of_any_recipe_tells_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40960}))
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    run = ["build", name, "--model", str(model), "--in-container"]
    printed = json.loads(dry([*run, "--json"]))
    text = dry(run)
    assert [stage["why"] for stage in printed["stages"]] == ["it is missing"] * 3
    assert text.count("would be made, because it is missing\n") == 3
    assert printed["container"][:2] == ["docker", "run"]
    assert "docker run \\\n  --rm \\\n" in text
    if load_recipe(name).engine.backend == "tensorrt_llm":
        assert printed["engine_command"][0] == "trtllm-build"
        assert " ".join(printed["engine_command"]) in text
    else:
        assert printed["engine_command"] is None
    assert tree(tmp_path) == before


def test_a_request_longer_than_the_context_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    run = ["build", "qwen2.5-7b-bf16-tp4-4090d", "--model", str(MODEL), "--engines", str(tmp_path), "--dry-run"]
    assert "engine.max_seq_len 32768 exceeds" in str(CliRunner().invoke(app, run).exception)


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    run = ["build", "qwen2-tiny-cpu", "--model", str(MODEL), "--repo", "mine", "--dry-run"]
    assert "holds files that are not a finished repository" in str(CliRunner().invoke(app, run).exception)


@pytest.mark.parametrize("place", ["/", ".", "engines", "engines/qwen2-tiny-cpu/engine", "model", "loop"])
def test_a_repository_never_replaces_what_the_build_rests_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "loop").symlink_to("model")
    before = tree(tmp_path)
    run = ["build", "qwen2-tiny-cpu", "--model", "model", "--repo", place, "--force"]
    problem = CliRunner().invoke(app, run).exception
    assert isinstance(problem, OutputError)
    assert tree(tmp_path) == before


def test_a_model_without_tokenizer_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    for name in ("tokenizer.json", "vocab.json"):
        (model / name).unlink()
    run = ["build", "qwen2-tiny-cpu", "--model", "model"]
    for arguments in ([*run, "--dry-run"], run):
        assert str(CliRunner().invoke(app, arguments).exception).startswith("model: has no tokenizer.json; ")
    assert not list(tmp_path.rglob("checkpoint"))


HEAVY = ("torch", "transformers", "grpc", "matplotlib", "numpy")


@pytest.mark.parametrize(
    ("arguments", "may"), [(["--help"], ()), (["build", "qwen2-tiny-cpu", "--model", str(MODEL)], ("numpy", "grpc"))]
)
def test_a_command_imports_what_it_needs(arguments: list[str], may: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from trtqwen.cli import app\n"
        "try: app()\n"
        f"except SystemExit: print('IMPORTED', *(name for name in {HEAVY} if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    imported = result.stdout.rpartition("IMPORTED")[2].split()
    assert result.stdout.count("IMPORTED") == 1, result.stderr
    assert set(imported) <= set(may)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name: str) -> None:
    output = CliRunner().invoke(app, [name, "--help"]).output
    assert f"Usage: trtqwen {name}" in output
    assert "--json" in output or "Commands:" in output


def test_a_mistyped_command_is_guessed() -> None:
    assert "Did you mean 'build'?" in CliRunner().invoke(app, ["buld"]).output


STOPS = """
import fcntl, os, signal, sys
from trtqwen.checkpoint import convert
from trtqwen.cli import main
call, write = fcntl.fcntl, convert.write_to_all
def without_leases(descriptor, command, *given):
    if command == fcntl.F_SETLEASE:
        raise OSError("this file system has none")
    return call(descriptor, command, *given)
def stop_first(*given):
    convert.write_to_all = write
    os.kill(os.getpid(), signal.SIGSTOP)
    write(*given)
if sys.argv.pop(1) == "without":
    fcntl.fcntl = without_leases
convert.write_to_all = stop_first
main()
"""
CUT = "import os, sys; os.truncate(sys.argv[1], 4096)"


@pytest.mark.parametrize("leases", ["with", "without"])
def test_a_shard_that_is_cut_short_while_convert_reads_it_is_one_sentence(tmp_path: Path, leases: str) -> None:
    """The conversion stops itself before its first tensor is written, and another process truncates the source."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    program = [sys.executable, "-c", STOPS, leases, "convert", model, "-o", tmp_path / "checkpoint"]
    conversion = start(*program, cwd=tmp_path)
    assert wait_for(lambda: stopped(conversion.pid) or conversion.poll() is not None)
    cut = start(sys.executable, "-c", CUT, model / "model.safetensors", cwd=tmp_path)
    assert wait_for(partial(waits_or_ended, cut))
    conversion.send_signal(signal.SIGCONT)
    _, told = conversion.communicate(timeout=120)
    assert conversion.returncode == 2, told
    what, _ = parse_error(told)
    assert "model.safetensors: " in what
    assert cut.wait(60) == 0
    assert not (tmp_path / "checkpoint").exists()


def waits_or_ended(process: subprocess.Popen[str]) -> bool:
    """Whether the kernel makes it wait until a lease is given back, or it has done its work."""
    return "BREAKING" in Path("/proc/locks").read_text() or process.poll() is not None
