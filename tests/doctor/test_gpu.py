"""The checks for GPUs, as far as a machine without one can go: gloo on the CPU, a stand-in for nvidia-smi."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trtqwen
from tests.doctor.conftest import FOUR, IN_IMAGE, check
from trtqwen.doctor.collective import all_reduce_problem, contribution, is_sum
from trtqwen.doctor.subject import Subject, System
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Host


@pytest.mark.slow
def test_the_all_reduce_runs_over_gloo() -> None:
    assert all_reduce_problem(2, "gloo", 60) is None


def test_an_all_reduce_that_hangs_ends_in_time() -> None:
    assert all_reduce_problem(2, "gloo", 0.05) == "not finished after 0.05 s: the first collective hangs"


def test_an_all_reduce_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch.py").write_text(f"raise ImportError({message!r})")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(trtqwen.__file__).parents[1]}")
    problem = all_reduce_problem(2, "nccl", 60)
    assert problem is not None
    assert f"failed: ImportError: {message}" in problem


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_damaged_sums_are_seen(world_size: int) -> None:
    size = 1 << 12
    reduced = torch.stack([contribution(rank, size) for rank in range(world_size)]).sum(0)
    assert is_sum(reduced, world_size)
    assert not is_sum(contribution(0, size), world_size)  # nothing was added
    assert not is_sum(torch.roll(reduced, 1), world_size)  # a block in the wrong place
    assert not is_sum(torch.zeros(size), world_size)
    reduced[7] += 1
    assert not is_sum(reduced, world_size)


@pytest.mark.parametrize(
    ("with_access", "without", "names", "verdict", "says"),
    [
        (None, None, "NVIDIA GeForce RTX 4090 D", "ok", "with and without peer access: every sum right"),
        ("wrong sums", None, "NVIDIA GeForce RTX 4090 D", "ok", "as GeForce cards are served"),
        ("wrong sums", None, "NVIDIA L40S", "warn", "export NCCL_P2P_DISABLE=1"),
        (None, "the first collective hangs", "NVIDIA L40S", "fail", "without peer access: 2 ranks: the first"),
    ],
)
def test_peer_access_is_tried_both_ways(
    monkeypatch: pytest.MonkeyPatch, with_access: str | None, without: str | None, names: str, verdict: str, says: str
) -> None:
    tried = []

    def all_reduce(ranks: int, backend: str, timeout: float, environment: dict[str, str]) -> str | None:
        tried.append((ranks, environment["NCCL_P2P_DISABLE"]))
        return without if environment["NCCL_P2P_DISABLE"] == "1" else with_access

    monkeypatch.setattr("trtqwen.doctor.gpu.all_reduce_problem", all_reduce)
    monkeypatch.setattr("trtqwen.doctor.gpu.cuda_version", lambda: "13.0")
    host = replace(IN_IMAGE, gpus=tuple(replace(gpu, name=names) for gpu in FOUR))
    result = check("D26", Subject(host, recipe=load_recipe("qwen2.5-7b-bf16-tp4-4090d"), gpu=True))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"
    assert (2, "1") in tried
    if verdict == "ok" and with_access is None:
        assert tried == [(2, "1"), (4, "1"), (2, "0"), (4, "0")]


def test_one_rank_needs_no_collective() -> None:
    result = check("D26", Subject(IN_IMAGE, recipe=load_recipe("qwen2.5-7b-bf16-tp1x4-4090d"), gpu=True))
    assert (result.verdict, "one rank" in result.evidence) == ("skip", True)


@pytest.mark.parametrize(
    ("host", "gpu", "says"),
    [
        (Host(), True, "no GPU here"),
        (replace(IN_IMAGE, gpus=FOUR[:1]), True, "one GPU reduces nothing"),
        (IN_IMAGE, False, "give --gpu"),
        (IN_IMAGE, True, "PyTorch here has no CUDA"),
    ],
)
def test_the_all_reduce_runs_when_asked_for(host: Host, gpu: bool, says: str) -> None:
    result = check("D26", Subject(host, gpu=gpu))
    assert (result.verdict, says in result.evidence) == ("skip", True)


APPS = "4242, /usr/bin/python3, 9200\n4243, [Not Found], 12"


def test_foreign_memory(machine: Callable[..., System]) -> None:
    assert check("D27", Subject(Host())).evidence == "no GPU here"
    system = machine(programs={"nvidia-smi": APPS})
    assert check("D27", Subject(IN_IMAGE, system)).verdict == "ok"
    desktop = replace(IN_IMAGE, gpus=(replace(FOUR[0], used_mib=700), *FOUR[1:]))
    assert check("D27", Subject(desktop, system)).verdict == "ok"
    busy = replace(IN_IMAGE, gpus=(replace(FOUR[0], used_mib=9300), *FOUR[1:]))
    result = check("D27", Subject(busy, system))
    assert result.verdict == "warn"
    assert "GPU 0 9300 of 24564 MiB in use: /usr/bin/python3 (pid 4242) 9200 MiB" in result.evidence
    assert "Not Found" not in result.evidence
    assert "a desktop?" in check("D27", Subject(busy, System(environ={"PATH": ""}))).evidence
