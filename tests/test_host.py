from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.standins.host import ADA, install
from trtqwen.system.host import Gpu, Host, read_host

OTHER = ("NVIDIA H200", "9.0")


def test_a_machine_with_tensorrt_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, gpus=(ADA, OTHER))
    host = read_host()
    assert (host.tensorrt_llm, host.tensorrt, host.driver) == ("1.2.1", "10.14.1.48", "590.44.01")
    assert host.trtllm_build == tmp_path / "bin" / "trtllm-build"
    assert host.python == Path(sys.executable)
    assert host.gpus == (Gpu(0, *ADA, 24564, 300), Gpu(1, *OTHER, 24564, 300))
    assert "tensorrt_llm" not in sys.modules


def test_a_machine_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    host = read_host()
    assert (host.trtllm_build, host.tensorrt_llm, host.python, host.gpus) == (None, None, None, ())


@pytest.mark.parametrize(
    "head",
    ["#!{python}\n", "#!{python} -I\n", "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"],
)
def test_versions_are_those_of_the_python_that_the_program_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """trtqwen may live in an environment of its own: another interpreter is asked, not imported from."""
    install(tmp_path, monkeypatch, program=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if str(tmp_path) not in entry])
    other = tmp_path / "venv" / "bin" / "python3.12"
    other.parent.mkdir(parents=True)
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    program = tmp_path / "bin" / "trtllm-build"
    program.write_text(head.format(python=other) + "import tensorrt_llm\n")
    program.chmod(0o755)
    host = read_host()
    assert (host.python, host.tensorrt_llm, host.tensorrt) == (other, "1.2.1", "10.14.1.48")


def test_a_program_that_is_no_script_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    (tmp_path / "bin" / "trtllm-build").write_bytes(b"\x7fELF /usr/bin/python3")
    host = read_host()
    assert (host.python, host.tensorrt_llm) == (None, "1.2.1")


@pytest.mark.parametrize(
    ("setting", "indices"),
    [(None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("", []), ("-1", []), ("7", []), ("GPU-abc,GPU-def", [0, 1])],
)
def test_cuda_visible_devices_is_heeded(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, indices: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    host = Host(gpus=tuple(Gpu(index, *ADA, 24564, 300) for index in range(3)))
    assert [gpu.index for gpu in host.visible_gpus] == indices


@pytest.mark.parametrize(
    ("output", "gpus"),
    [
        ("No devices were found", ()),
        ("0, NVIDIA GB10, 12.1, [N/A], [N/A], 580.95.05", (Gpu(0, "NVIDIA GB10", "12.1", 0, 0),)),
    ],
)
def test_nvidia_smi_may_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, gpus: tuple[Gpu, ...]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{output}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert read_host().gpus == gpus
