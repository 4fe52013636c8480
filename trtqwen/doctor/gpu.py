"""Checks that need GPUs."""

from __future__ import annotations

import importlib.util

from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.collective import all_reduce_problem, cuda_version
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.facts.cards import has_peer_to_peer

_SECONDS = 60
_FOREIGN_MIB = 1024  # a desktop and its browser take less
_SHOWN_MIB = 100


class AllReduce(Check):
    """NCCL's sums over the GPUs are right.

    With peer access they have to be right only on cards that have it: GeForce cards are served without.
    """

    id = "D26"
    level = "error"
    title = "all-reduce"

    def run(self, subject: Subject) -> Result:
        count = len(subject.host.gpus)
        if count == 0:
            raise Skip("no GPU here")
        if count == 1:
            raise Skip("one GPU reduces nothing")
        if subject.recipe is not None and subject.engine_ranks == 1:
            raise Skip("the recipe's engine has one rank, which reduces nothing")
        if not subject.gpu:
            raise Skip("give --gpu: it runs on every GPU for some seconds")
        if importlib.util.find_spec("torch") is None:
            raise Skip("needs PyTorch; --in-container has it")
        if not cuda_version():
            raise Skip("PyTorch here has no CUDA; --in-container tests the image's NCCL")
        sizes = sorted({2, min(count, max(2, subject.engine_ranks))})
        over = f"all-reduce over {' and '.join(map(str, sizes))} GPUs"
        without = _first_problem(sizes, peer_access=False)
        if without is not None:
            return self.found(f"{over}, without peer access: {without}", "see D06 and D07, and run nccl-tests")
        with_access = _first_problem(sizes, peer_access=True)
        if with_access is None:
            return Result("ok", f"{over}, with and without peer access: every sum right")
        text = f"{over}, with peer access: {with_access}; without it every sum is right"
        if not all(has_peer_to_peer(gpu.name) for gpu in subject.host.gpus):
            return Result("ok", f"{text}, as GeForce cards are served")
        return self.found(text, "export NCCL_P2P_DISABLE=1", "warning")


def _first_problem(sizes: list[int], *, peer_access: bool) -> str | None:
    for ranks in sizes:
        found = all_reduce_problem(
            ranks, "nccl", _SECONDS, {"NCCL_P2P_DISABLE": "0" if peer_access else "1", "NCCL_DEBUG": "WARN"}
        )
        if found is not None:
            return f"{ranks} ranks: {found}"
    return None


class ForeignMemory(Check):
    """The engine takes the free memory of a card when it loads.

    Other processes on the card make its KV cache smaller.
    """

    id = "D27"
    level = "warning"
    title = "other users of GPU memory"

    def run(self, subject: Subject) -> Result:
        if not subject.host.gpus:
            raise Skip("no GPU here")
        full = [gpu for gpu in subject.host.gpus if gpu.used_mib > _FOREIGN_MIB]
        if not full:
            return Result("ok", f"under {_FOREIGN_MIB} MiB on each of {len(subject.host.gpus)} GPUs")
        query = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
        rows = [row.split(", ") for row in (subject.system.output(*query) or "").splitlines() if row.count(", ") == 2]
        large = [row for row in rows if row[2].isdecimal() and int(row[2]) >= _SHOWN_MIB]
        large.sort(key=lambda row: -int(row[2]))
        holders = ", ".join(f"{name} (pid {pid}) {used} MiB" for pid, name, used in large)
        used = ", ".join(f"GPU {gpu.index} {gpu.used_mib} of {gpu.memory_mib} MiB" for gpu in full)
        if not holders:
            hint = "stop the desktop, or leave it there: the engine's KV cache takes what is free"
            return self.found(f"{used} in use, by no compute process: a desktop?", hint)
        return self.found(f"{used} in use: {holders}", "end them before the engine loads, which takes what is free")


CHECKS: tuple[Check, ...] = (AllReduce(), ForeignMemory())
