"""The cards and docker of a host, with stand-ins for nvidia-smi and docker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.conftest import FOUR, IN_IMAGE, check
from trtqwen.doctor.subject import Subject, System
from trtqwen.engine.provenance import PROVENANCE, Provenance
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Host

Machine = Callable[..., System]
HOST = Host(driver="590.48.01", gpus=FOUR)
TP4, TP1 = (load_recipe(f"qwen2.5-7b-bf16-{layout}-4090d") for layout in ("tp4", "tp1x4"))
DIGEST = "nvcr.io/nvidia/tritonserver@sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("name", "rows", "verdict", "says"),
    [
        ("D37", "0, 16, 16, 4\n1, 16, 16, 4", "ok", "GPU 1 x16 of x16, PCIe 4"),
        ("D37", "0, 8, 16, 4", "ok", ""),  # many boards split the lanes
        ("D37", "0, 16, 16, 4\n1, 4, 16, 4", "warn", "GPU 1 has 4 of 16 lanes"),
        ("D37", "0, 16, 16, 3", "warn", "PCIe 3"),
        ("D37", "0, [N/A], [N/A], [N/A]", "ok", ""),
        ("D38", "0, 425.00, 425.00", "ok", "425.00 of 425.00 W"),
        ("D38", "0, 300.00, 425.00", "warn", "71% of its default"),
        ("D38", "0, [N/A], [N/A]", "ok", ""),
        ("D39", "0, Enabled\n1, Enabled", "ok", "on for 2 GPUs"),
        ("D39", "0, Enabled\n1, Disabled", "warn", "nvidia-smi -pm 1"),
        ("D39", "no such field", "skip", "does not tell"),
    ],
)
def test_cards(machine: Machine, name: str, rows: str, verdict: str, says: str) -> None:
    result = check(name, Subject(HOST, machine(programs={"nvidia-smi": rows}), TP4))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"
    assert check(name, Subject(Host())).evidence == "no GPU here"


def test_few_lanes_do_not_matter_without_all_reduce(machine: Machine) -> None:
    system = machine(programs={"nvidia-smi": "0, 1, 16, 3"})
    assert check("D37", Subject(HOST, system, TP1)).verdict == "ok"


@pytest.mark.parametrize(
    ("programs", "verdict", "says"),
    [
        ({}, "skip", "no docker here"),
        ({"docker": '{"nvidia":{"path":"nvidia-container-runtime"},"runc":{}}'}, "ok", ""),
        ({"docker": '{"runc":{}}'}, "fail", "nvidia-ctk runtime configure"),
        ({"docker": '{"runc":{}}', "nvidia-ctk": ""}, "ok", "Toolkit"),  # newer dockers use its hook
    ],
)
def test_the_container_toolkit(machine: Machine, programs: dict[str, str], verdict: str, says: str) -> None:
    system = machine(programs=programs)
    result = check("D35", Subject(HOST, system))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"
    assert check("D35", Subject(replace(IN_IMAGE, image=None), system)).verdict == "skip"
    assert "outside of the container" in check("D35", Subject(IN_IMAGE, system)).evidence


@pytest.mark.parametrize(("disk", "verdict"), [(100, "ok"), (20, "fail")])
def test_room_for_the_image(machine: Machine, disk: float, verdict: str) -> None:
    system = machine(disk=disk)
    program = Path(system.environ["PATH"]) / "docker"
    program.write_text('#!/bin/sh\n[ "$1" = image ] && exit 1\necho /var/lib/docker\n')
    program.chmod(0o755)
    result = check("D36", Subject(HOST, system))
    assert result.verdict == verdict, result
    assert "/var/lib/docker has" in result.evidence
    program.write_text("#!/bin/sh\necho sha256:1\n")
    assert "26.07-trtllm-python-py3 is here" in check("D36", Subject(HOST, system)).evidence


@pytest.mark.parametrize(
    ("recorded", "here", "verdict", "says"),
    [
        (DIGEST, DIGEST, "ok", DIGEST),
        (DIGEST, DIGEST.replace("a", "b"), "warn", f"serve with --image {DIGEST}"),
        (None, DIGEST, "ok", "was not recorded"),
        (DIGEST, "", "skip", "docker does not have"),
    ],
)
def test_the_image_of_the_engine(
    machine: Machine, tmp_path: Path, recorded: str | None, here: str, verdict: str, says: str
) -> None:
    record = Provenance(
        tensorrt_llm="1.2.1",
        tensorrt="10.14.1.48",
        gpu="g",
        compute_capability="8.9",
        driver=None,
        image="nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3",
        image_digest=recorded,
        checkpoint="k",
        flags={},
        changes=[],
    )
    (tmp_path / PROVENANCE).write_text(record.model_dump_json())
    result = check("D40", Subject(HOST, machine(programs={"docker": here}), engine=tmp_path))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"
    (tmp_path / PROVENANCE).write_text(json.dumps({**record.model_dump(), "image": None}))
    assert check("D40", Subject(HOST, engine=tmp_path)).verdict == "skip"
