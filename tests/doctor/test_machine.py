"""The machine under the software, from directories that stand in for its root."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doctor.conftest import FOUR, IN_IMAGE, check, limits_text
from trtqwen.demo import MODEL
from trtqwen.doctor import machine as doctor_machine
from trtqwen.doctor.subject import Subject, System
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Host

ON_HOST = Host(driver="590.48.01", gpus=FOUR)

Machine = Callable[..., System]
CARDS = {
    f"sys/bus/pci/devices/0000:{bus}:00.0/{name}": value
    for bus in ("41", "81")
    for name, value in (("vendor", "0x10de\n"), ("class", "0x030000\n"))
}
AUDIO = {
    "sys/bus/pci/devices/0000:41:00.1/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:41:00.1/class": "0x040300\n",
}
IOMMU = {"sys/kernel/iommu_groups/0/type": "DMA\n"}
LSPCI = """\
40:01.1 PCI bridge: Advanced Micro Devices, Inc. [AMD] Starship/Matisse GPP Bridge
\tCapabilities: [2a0 v1] Access Control Services
\t\tACSCap:\tSrcValid+ TransBlk+ ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans+
\t\tACSCtl:\tSrcValid{on} TransBlk- ReqRedir{on} CmpltRedir{on} UpstreamFwd{on} EgressCtrl- DirectTrans-

41:00.0 VGA compatible controller: NVIDIA Corporation AD102 [GeForce RTX 4090 D]
\tKernel driver in use: nvidia"""


@pytest.mark.parametrize(
    ("files", "lspci", "environ", "verdict", "says"),
    [
        ({}, None, {}, "skip", "fewer than two NVIDIA cards"),
        (dict(list(CARDS.items())[:2]) | AUDIO, None, {}, "skip", "fewer than two"),
        (CARDS, None, {}, "skip", "pciutils"),
        (CARDS, LSPCI.replace("{on}", "-"), {}, "ok", "2 cards"),
        (CARDS, LSPCI.replace("{on}", "+"), {}, "warn", "1 bridges: 40:01.1"),
        (CARDS, LSPCI.replace("{on}", "+"), {"NCCL_P2P_DISABLE": "1"}, "ok", "NCCL_P2P_DISABLE is set"),
        (CARDS | IOMMU, LSPCI.replace("{on}", "-"), {}, "warn", "iommu=pt"),
        (CARDS | IOMMU | {"proc/cmdline": "quiet amd_iommu=on iommu=pt\n"}, LSPCI.replace("{on}", "-"), {}, "ok", ""),
    ],
)
def test_pci(
    machine: Machine, files: dict[str, str], lspci: str | None, environ: dict[str, str], verdict: str, says: str
) -> None:
    programs = {} if lspci is None else {"lspci": lspci}
    result = check("D06", Subject(Host(), machine(files, programs, environ)))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


LIMITED = limits_text("8388608", "8388608")


@pytest.mark.parametrize(
    ("host", "files", "shm", "verdict", "says"),
    [
        (Host(), {}, 16, "ok", "16.0 GiB for 1 rank"),
        (Host(), {}, 1 / 16, "fail", "--shm-size"),  # what docker gives
        (IN_IMAGE, {}, 2, "fail", "for 4 ranks"),  # what Kubernetes gives
        (IN_IMAGE, {}, 16, "ok", "for 4 ranks"),
        (IN_IMAGE, {"proc/self/limits": LIMITED}, 16, "fail", "--ulimit memlock=-1"),
        (Host(), {"proc/self/limits": LIMITED}, 16, "ok", ""),  # nothing is pinned without a GPU
        (ON_HOST, {"proc/self/limits": LIMITED}, 16, "ok", ""),  # --in-container sets the limits
        (ON_HOST, {}, 2, "fail", "remount,size=16g /dev/shm"),
        (Host(), {"dev/shm/nccl-J5mPq1": "", "dev/shm/sem.other": ""}, 16, "warn", "rm /dev/shm/nccl-J5mPq1"),
        (
            Host(),
            {"dev/shm/nccl-a": "", "proc/12/maps": "7f00-7f01 rw-s 00000000 00:17 3  /dev/shm/nccl-a\n"},
            16,
            "ok",
            "",
        ),
        # A server that runs: its owner file is locked, not mapped.
        (Host(), {"dev/shm/trtqwen-1f-owner": "", "dev/shm/trtqwen-1f-0_a": ""}, 16, "ok", ""),
        (
            Host(),
            {"dev/shm/trtqwen-1f-owner.new": "", "dev/shm/trtqwen-2e-0_a": ""},
            16,
            "warn",
            "rm /dev/shm/trtqwen-2e",
        ),
    ],
)
def test_shared_memory(
    machine: Machine, host: Host, files: dict[str, str], shm: float, verdict: str, says: str
) -> None:
    result = check("D07", Subject(host, machine(files, shm=shm), load_recipe("qwen2.5-7b-fp16-tp4-4090d")))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def test_shared_memory_of_other_users_is_left_to_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(Host(), machine({"dev/shm/nccl-a": ""}, shm=16))
    assert check("D07", subject).verdict == "warn"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert check("D07", subject).verdict == "ok"


@pytest.mark.parametrize(
    ("files", "disk", "verdict", "says"),
    [
        ({}, 100, "ok", "of 64.0 GiB"),
        ({}, 0.01, "fail", "--engines"),
        ({"proc/meminfo": "MemFree: 9 kB\nMemAvailable:     200000 kB\n"}, 100, "fail", "the machine leaves 0.2"),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1\n"}, 100, "ok", ""),
        (
            {"sys/fs/cgroup/memory.max": "536870912\n", "sys/fs/cgroup/memory.current": "436870912\n"},
            100,
            "fail",
            "the control group leaves 0.1",
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "436870912\n",
            },
            100,
            "fail",
            "the control group",
        ),
    ],
)
def test_room_for_the_conversion(
    machine: Machine, files: dict[str, str], disk: float, verdict: str, says: str
) -> None:
    result = check("D09", Subject(Host(), machine(files, disk=disk), model=MODEL))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def test_this_machine_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_SEGMENTS", ("nobody's-",))  # another program may have left some here
    statistics = os.statvfs("/dev/shm")
    result = check("D07", Subject(Host()))
    assert f"/dev/shm {statistics.f_frsize * statistics.f_blocks / 2**30:.1f} GiB" in result.evidence
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    assert check("D09", Subject(Host(), model=MODEL)).evidence.startswith("memory")
    assert int(line.split()[1]) > 0
