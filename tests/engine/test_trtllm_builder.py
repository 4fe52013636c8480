from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.conftest import rewrite_manifest
from tests.standins.host import ADA, install
from trtqwen.artifact.manifest import read_manifest
from trtqwen.artifact.stage import BuildProgress
from trtqwen.diagnostics import EngineError, TrtQwenError
from trtqwen.engine.builder import build_engine
from trtqwen.engine.config import read_engine_config
from trtqwen.engine.provenance import check_provenance, read_provenance
from trtqwen.engine.trtllm_builder import BuildFailed, log_tail
from trtqwen.recipe import EngineRecipe, ServeRecipe
from trtqwen.system.host import Host, read_host

RECIPE = EngineRecipe(backend="tensorrt_llm", max_batch_size=8, max_num_tokens=512, max_seq_len=256, workers=4)
HOPPER = ("NVIDIA H100 80GB HBM3", "9.0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Host]:
    def make(**options: Any) -> Host:
        install(tmp_path / "machine", monkeypatch, **options)
        return read_host()

    return make


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def test_the_engine_is_built_and_accounted_for(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = machine()
    seen: list[BuildProgress] = []
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    home = tmp_path / "engines" / "recipe"
    manifest = build_engine(
        checkpoint, RECIPE, home / "engine", serve=ServeRecipe(), card="rtx-4090d", watch=seen.append
    )
    assert list(work.iterdir()) == []  # no model.cache
    config = read_engine_config(home / "engine")
    assert (config.backend, config.version, config.build_config.tokens_per_block) == ("tensorrt_llm", "1.2.1", 32)
    assert set(manifest.outputs) >= {"rank0.engine", "rank1.engine", "config.json", "provenance.json"}
    assert "tokenizer/tokenizer.json" in manifest.outputs
    done = [progress.ranks_done for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].ranks_done, seen[-1].ranks) == (2, 2)
    assert [progress.line for progress in seen] == (home / "build.log").read_text().splitlines()
    record = read_provenance(home / "engine")
    assert record is not None
    assert (record.tensorrt_llm, record.tensorrt, record.gpu, record.compute_capability) == (
        "1.2.1",
        "10.14.1.48",
        *ADA,
    )
    assert (record.driver, record.checkpoint) == ("590.44.01", read_manifest(checkpoint, "checkpoint").key)
    assert record.flags["max_num_tokens"] == 512
    assert "workers" not in record.flags
    assert record.changes == []
    assert check_provenance(home / "engine", host) == []


def test_two_builds_on_one_machine_are_equal(machine: Callable[..., Host], checkpoint: Path, tmp_path: Path) -> None:
    machine()
    first = build_engine(checkpoint, RECIPE, tmp_path / "a" / "engine")
    other = build_engine(checkpoint, RECIPE.model_copy(update={"workers": 1}), tmp_path / "b" / "engine")
    assert first.key == other.key
    assert first.outputs["provenance.json"] == other.outputs["provenance.json"]


def test_what_the_builder_changed_is_told(machine: Callable[..., Host], checkpoint: Path, tmp_path: Path) -> None:
    machine()
    recipe = RECIPE.model_copy(update={"max_num_tokens": 8192, "opt_num_tokens": 4096})
    build_engine(checkpoint, recipe, tmp_path / "engine")
    record = read_provenance(tmp_path / "engine")
    assert record is not None
    told = [str(change) for change in record.changes]
    assert told == [
        "max_num_tokens: asked 8192, built 2048: no step holds more than max_batch_size times max_seq_len",
        "opt_num_tokens: asked 4096, built 2048: it cannot exceed max_num_tokens",
    ]


@pytest.mark.parametrize("promise", ["enable_chunked_context", "enable_kv_cache_reuse"])
def test_an_engine_that_breaks_a_serving_promise_is_refused(
    machine: Callable[..., Host], damaged: Path, tmp_path: Path, promise: str
) -> None:
    machine()
    config = json.loads((damaged / "config.json").read_text())
    config["quantization"]["kv_cache_quant_algo"] = "FP8"  # the builder then drops paged context FMHA
    (damaged / "config.json").write_text(json.dumps(config))
    rewrite_manifest(damaged)
    serve = ServeRecipe(enable_chunked_context=False).model_copy(update={promise: True})
    with pytest.raises(EngineError, match=f"without use_paged_context_fmha .*serve.{promise} needs it"):
        build_engine(damaged, RECIPE, tmp_path / "engine", serve=serve)
    assert not (tmp_path / "engine").exists()
    build_engine(damaged, RECIPE, tmp_path / "engine", serve=ServeRecipe(enable_chunked_context=False))
    record = read_provenance(tmp_path / "engine")
    assert record is not None
    assert [(change.setting, change.effective) for change in record.changes] == [
        ("use_paged_context_fmha", "disable")
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("out_of_memory", r"failed \(exit code 1\): the GPU's memory is not enough .*lower engine\.max_num_tokens"),
        ("no_gpu", r"exit code 1\): no GPU is visible to this process; build where nvidia-smi"),
        ("no_workers", r"exit code 1\): no GPU is visible to this process"),
        ("pool", r"exit code 1\): a worker process of the build died, .*host memory; lower engine\.workers"),
        ("killed", r"ended by SIGKILL\): it was killed from outside, usually .*host ran out of memory"),
        ("exit137", r"exit code 137\): it was killed from outside, usually .*host ran out of memory"),
        ("orphan", r"ended by SIGKILL\): it was killed from outside"),
        ("silent", r"exit code 3\): the cause is not known"),
        ("lost_rank", r"ended well, but rank1\.engine is missing or empty"),
        ("empty_rank", r"ended well, but rank1\.engine is missing or empty"),
        ("no_config", r"ended well, but config\.json is missing"),
    ],
)
def test_each_failure_is_explained_and_its_log_kept(
    machine: Callable[..., Host],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    message: str,
) -> None:
    machine()
    monkeypatch.setenv("STANDIN_FAIL", how)
    with pytest.raises(BuildFailed, match=message) as caught:
        build_engine(checkpoint, RECIPE, tmp_path / "home" / "engine")
    log = tmp_path / "home" / "build.log"
    assert caught.value.log == log
    assert str(caught.value).endswith(f"log: {log}")
    assert "\n" not in str(caught.value)
    assert 0 < len(log_tail(log, 3)) <= 3
    assert [path.name for path in log.parent.iterdir() if path.suffix != ".cache"] == ["build.log"]


def test_a_checkpoint_without_a_tensor_is_explained(
    machine: Callable[..., Host], damaged: Path, tmp_path: Path
) -> None:
    machine()
    tensors = load_file(damaged / "rank1.safetensors")
    del tensors["transformer.layers.2.attention.qkv.bias"]
    save_file(tensors, damaged / "rank1.safetensors")
    rewrite_manifest(damaged)
    with pytest.raises(BuildFailed, match=r"lacks tensors that this release looks for.*convert again"):
        build_engine(damaged, RECIPE, tmp_path / "engine")


def test_rank_files_of_two_conversions_are_explained(
    machine: Callable[..., Host], damaged: Path, tmp_path: Path
) -> None:
    machine()
    config = json.loads((damaged / "config.json").read_text())
    config["mapping"].update(world_size=1, tp_size=1)
    (damaged / "config.json").write_text(json.dumps(config))
    rewrite_manifest(damaged)
    with pytest.raises(BuildFailed, match=r"has another shape than config\.json gives it"):
        build_engine(damaged, RECIPE, tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"program": False}, ("trtllm-build is not on this machine: the checkpoint is written", "1.2.1", "26.07")),
        ({"tensorrt_llm": "1.3.0rc22", "program": False}, ("builds no engines", "26.07-trtllm", "trtllm-serve")),
        ({"tensorrt_llm": "1.4.0"}, ("TensorRT-LLM 1.4.0 builds no engines", "26.07-trtllm")),
        ({"tensorrt_llm": "1.1.0", "tensorrt": "10.13.3.9"}, ("1.1.0", "1.2.1", "26.07", "release: 1.1.0")),
        ({"tensorrt_llm": "1.0.3.2510"}, ("1.0.3.2510 is installed", "checkpoint.release 1.2.1; build in")),
        ({"tensorrt": "10.11.0.33"}, ("TensorRT 10.11.0.33 is installed", "made for 10.14", "26.07")),
        ({"tensorrt": None}, ("TensorRT is not installed", "made for 10.14")),
        ({"tensorrt_llm": None}, ("its Python has no TensorRT-LLM", "26.07")),
        ({"gpus": ()}, ("no GPU is visible: converting works here", "nvidia-smi")),
        ({"gpus": (HOPPER,)}, ("NVIDIA H100 80GB HBM3", "9.0", "rtx-4090d has 8.9")),
        ({"gpus": (ADA, HOPPER)}, ("GPU 1 is an NVIDIA H100",)),
    ],
)
def test_a_machine_that_cannot_build_is_refused_before_anything_runs(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    machine(**options)
    with pytest.raises(EngineError) as caught:
        build_engine(checkpoint, RECIPE, tmp_path / "home" / "engine", card="rtx-4090d")
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_a_local_version_is_the_release_it_is_made_of(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path
) -> None:
    machine(tensorrt_llm="1.2.1+cu130")
    build_engine(checkpoint, RECIPE, tmp_path / "engine")


def test_a_program_whose_help_fails_is_explained(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setenv("STANDIN_FAIL", "help")
    with pytest.raises(
        EngineError, match=r"--help` failed \(exit code 1\): the container runs without the GPU driver"
    ):
        build_engine(checkpoint, RECIPE, tmp_path / "engine")


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_the_builder_ends_with_us(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blow: int
) -> None:
    machine()
    monkeypatch.setenv("STANDIN_FAIL", "hang")
    script = (
        "import sys; from pathlib import Path; from trtqwen.engine.builder import build_engine\n"
        "from trtqwen.recipe import EngineRecipe\n"
        f"recipe = EngineRecipe.model_validate({RECIPE.model_dump()!r})\n"
        "show = lambda progress: print(progress.line, flush=True)\n"
        "build_engine(Path(sys.argv[1]), recipe, Path(sys.argv[2]), watch=show)"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(tmp_path / "home" / "engine")]
    us = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert us.stdout is not None
    child = next(int(line.split()[1]) for line in us.stdout if line.startswith("child "))
    parent = int(Path(f"/proc/{child}/stat").read_text().split()[3])
    us.send_signal(blow)
    us.wait(timeout=60)
    mine = [parent, child] if blow == signal.SIGINT else [parent]  # a killed process ends its child, no further
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in mine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in mine if _runs(pid)]
    if blow == signal.SIGKILL:
        os.kill(child, signal.SIGKILL)
    else:
        assert [path.name for path in (tmp_path / "home").iterdir() if path.suffix != ".cache"] == ["build.log"]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_half_written_record_is_an_error_not_a_traceback(
    machine: Callable[..., Host], checkpoint: Path, tmp_path: Path
) -> None:
    host = machine()
    build_engine(checkpoint, RECIPE, tmp_path / "engine")
    (tmp_path / "engine" / "provenance.json").write_text("{")
    with pytest.raises(TrtQwenError, match=r"provenance\.json: .*build the engine again"):
        check_provenance(tmp_path / "engine", host)
