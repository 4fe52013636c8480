"""Checks of the machine: PCI express, shared memory, limits, and memory and disk for a conversion."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from trtqwen.checkpoint.convert import plan_conversion
from trtqwen.diagnostics import Diagnostic, TrtQwenError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject, System
from trtqwen.recipe import CheckpointRecipe
from trtqwen.system.leftovers import without_owner

GIB = 2**30
_SHM_PER_RANK = GIB  # NCCL and Triton's python backend; containers start with 64 MiB
_SEGMENTS = ("nccl-", "triton", "trtqwen-", "cuda.shm.")
_STACK = 67108864  # what NVIDIA's images ask for, in bytes
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_PEAK_TENSORS, _PEAK_BASE = 3, GIB // 2  # measured: less than the largest tensor three times, and Python itself
_DISK = 2.2  # checkpoint, engine of the same size, slack


class PciRouting(Check):
    """ACS and IOMMU send what one card writes to another through the root complex: hangs and wrong data."""

    id = "D06"
    level = "warning"
    title = "PCI express: ACS and IOMMU"

    def run(self, subject: Subject) -> Result:
        system = subject.system
        cards = list(_nvidia_cards(system))
        if len(cards) < 2:
            raise Skip("fewer than two NVIDIA cards on the PCI bus")
        if system.environ.get("NCCL_P2P_DISABLE", "0") != "0":
            return Result("ok", f"{len(cards)} cards, NCCL_P2P_DISABLE is set: nothing goes from card to card")
        problems = []
        words = (system.read("proc/cmdline") or "").split()
        if _iommu_is_on(system) and "iommu=pt" not in words:
            hint = "boot with iommu=pt, switch the IOMMU off in the BIOS, or export NCCL_P2P_DISABLE=1"
            problems.append(Diagnostic("the IOMMU translates (no iommu=pt on the kernel's command line)", hint))
        listing = system.output("lspci", "-vvv") or ""
        bridges = _acs_bridges(listing)
        if bridges:
            text = f"ACS redirects at {len(bridges)} bridges: {', '.join(bridges[:4])}"
            problems.append(Diagnostic(text, "setpci -s BRIDGE ECAP_ACS+6.w=0000, or export NCCL_P2P_DISABLE=1"))
        if not problems and "ACSCtl" not in listing:
            raise Skip("lspci does not show ACS; run as root with pciutils installed")
        return self.judge(problems, f"{len(cards)} cards, neither in the way")


def _nvidia_cards(system: System) -> Iterator[str]:
    for device in sorted((system.root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = (system.read(f"sys/bus/pci/devices/{device.name}/{name}") for name in ("vendor", "class"))
        if (vendor or "").strip() == _NVIDIA and (kind or "").startswith(_DISPLAY):
            yield device.name


def _iommu_is_on(system: System) -> bool:
    groups = system.root / "sys/kernel/iommu_groups"
    return groups.is_dir() and any(groups.iterdir())


def _acs_bridges(listing: str) -> list[str]:
    """Addresses of the bridges where ACS validates and redirects, from `lspci -vvv`."""
    blocks = re.split(r"\n(?=\S)", listing)
    return [block.split()[0] for block in blocks if re.search(r"ACSCtl:.*(SrcValid|ReqRedir)\+", block)]


class SharedMemory(Check):
    """Ranks and Triton's python models exchange data in /dev/shm, and NCCL locks memory.

    Containers start with too little of both. The check also names segments that killed servers left.
    """

    id = "D07"
    level = "error"
    title = "shared memory and limits"

    def run(self, subject: Subject) -> Result:
        system, ranks = subject.system, subject.local_ranks
        shm = system.root / "dev/shm"
        if not shm.is_dir():
            raise Skip(f"{shm}: is not there")
        total = system.disk_usage(shm)[0]
        problems = []
        if total < ranks * _SHM_PER_RANK:
            text = f"/dev/shm has {total / GIB:.2f} GiB for {ranks} ranks, one GiB each is needed"
            hint = "start the container with --ipc=host or --shm-size=16g"
            if subject.starts_containers and subject.host.gpus:  # with --ipc=host, which takes the host's
                hint = "mount -o remount,size=16g /dev/shm"
            problems.append(Diagnostic(text, hint))
        if subject.host.gpus and subject.engine_ranks > 1 and not subject.starts_containers:
            problems += _limits(system)
        stale = _stale_segments(system)
        if stale:
            text = f"/dev/shm holds {len(stale)} segments that no process has open: {', '.join(stale[:4])}"
            hint = f"rm {' '.join(f'/dev/shm/{name}' for name in stale[:4])}"
            problems.append(Diagnostic(text, hint + (" ..." if len(stale) > 4 else ""), "warning"))
        return self.judge(problems, f"/dev/shm {total / GIB:.1f} GiB for {ranks} {'rank' if ranks == 1 else 'ranks'}")


def _limits(system: System) -> Iterator[Diagnostic]:
    soft = {
        found[1].strip(): found[2]
        for found in re.finditer(r"^(Max .*?)\s{2,}(\S+)", system.read("proc/self/limits") or "", re.MULTILINE)
    }
    memlock, stack = soft.get("Max locked memory", "unlimited"), soft.get("Max stack size", "unlimited")
    if memlock != "unlimited":
        text = f"locked memory is limited to {int(memlock) / 2**20:.0f} MiB; NCCL's host buffers need more"
        yield Diagnostic(text, "start the container with --ulimit memlock=-1")
    if stack != "unlimited" and int(stack) < _STACK:
        text = f"the stack is limited to {int(stack) / 2**20:.0f} MiB"
        yield Diagnostic(text, f"start the container with --ulimit stack={_STACK}", "warning")


def _stale_segments(system: System) -> list[str]:
    """Return shared-memory segments of killed servers, which no process maps, without those of other users.

    Only root can see what other users' processes map.
    """
    names = without_owner({path.name for path in (system.root / "dev/shm").iterdir() if _may_be_stale(path)})
    if names:
        for maps in (system.root / "proc").glob("[0-9]*/maps"):
            text = system.read(str(maps.relative_to(system.root))) or ""
            names = {name for name in names if f"/dev/shm/{name}" not in text}
    return sorted(names)


def _may_be_stale(path: Path) -> bool:
    try:
        return path.name.startswith(_SEGMENTS) and os.getuid() in (0, path.stat().st_uid)
    except OSError:  # it was removed
        return False


class ConversionRoom(Check):
    """Memory and disk hold the conversion: three times the largest tensor, and checkpoint and engine."""

    id = "D09"
    level = "error"
    title = "memory and disk"

    def run(self, subject: Subject) -> Result:
        source, system = subject.source, subject.system
        settings = subject.recipe.checkpoint if subject.recipe else CheckpointRecipe()
        try:
            plan = plan_conversion(source.directory, settings)
        except TrtQwenError:
            raise Skip("the model cannot be converted so, see D10, D11 and D16") from None
        peak = _PEAK_TENSORS * max(source.spec(name).nbytes for name in source) + _PEAK_BASE
        available, limited_by = _available_memory(system)
        needed, free = int(_DISK * plan.nbytes), system.disk_usage(system.work)[2]
        problems = []
        if available < peak:
            text = f"conversion takes up to {peak / GIB:.1f} GiB of memory, {limited_by} leaves {available / GIB:.1f}"
            problems.append(Diagnostic(text, "end other programs, raise the limit or add swap"))
        if free < needed:
            text = f"checkpoint and engine take about {needed / GIB:.1f} GiB, the disk has {free / GIB:.1f} free"
            problems.append(Diagnostic(text, "make room, or build with --engines on another disk"))
        evidence = (
            f"memory {peak / GIB:.1f} of {available / GIB:.1f} GiB, disk {needed / GIB:.1f} of {free / GIB:.1f}"
        )
        return self.judge(problems, evidence)


def _available_memory(system: System) -> tuple[int, str]:
    """Return the bytes that a process can allocate, and their limit: the machine or its control group (v2, v1)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", system.read("proc/meminfo") or "", re.MULTILINE)
    if found is None:
        raise Skip("/proc/meminfo cannot be read")
    rooms = [(int(found[1]) * 1024, "the machine")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        texts = [(system.read(f"sys/fs/cgroup/{name}") or "").strip() for name in (limit, used)]
        if all(text.isdecimal() for text in texts):
            rooms.append((int(texts[0]) - int(texts[1]), "the control group"))
    return min(rooms)


CHECKS: tuple[Check, ...] = (PciRouting(), SharedMemory(), ConversionRoom())
