"""Checks that need GPUs."""

from __future__ import annotations

import importlib.util

from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.collective import all_reduce_problem
from trtqwen.doctor.subject import Skip, Subject

_SECONDS = 60
_FOREIGN_MIB = 200


class AllReduce(Check):
    id = "D26"
    level = "error"
    title = "the cards add up right"

    def run(self, subject: Subject) -> Result:
        count = len(subject.host.gpus)
        if count == 0:
            raise Skip("no GPU here")
        if count == 1:
            raise Skip("one GPU reduces nothing")
        if not subject.gpu:
            raise Skip("give --gpu: it runs on every GPU for some seconds")
        if importlib.util.find_spec("torch") is None:
            raise Skip("needs PyTorch")
        for ranks in sorted({2, count}):
            found = all_reduce_problem(ranks, "nccl", _SECONDS)
            if found is not None:
                remedy = "export NCCL_P2P_DISABLE=1; if it is set, see D06 and D07, and run nccl-tests"
                return self.found(f"all-reduce over {ranks} GPUs: {found}", remedy)
        return Result("ok", f"all-reduce over {' and '.join(map(str, sorted({2, count})))} GPUs, every sum right")


class ForeignMemory(Check):
    id = "D27"
    level = "warning"
    title = "nobody else holds GPU memory"

    def run(self, subject: Subject) -> Result:
        if not subject.host.gpus:
            raise Skip("no GPU here")
        full = [gpu for gpu in subject.host.gpus if gpu.used_mib > _FOREIGN_MIB]
        if not full:
            return Result("ok", f"under {_FOREIGN_MIB} MiB on each of {len(subject.host.gpus)} GPUs")
        query = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
        rows = [row.split(", ") for row in (subject.system.output(*query) or "").splitlines() if row.count(", ") == 2]
        holders = ", ".join(f"{name} (pid {pid}) {used} MiB" for pid, name, used in rows)
        used = ", ".join(f"GPU {gpu.index} {gpu.used_mib} of {gpu.memory_mib} MiB" for gpu in full)
        text = f"{used} in use: {holders or 'by no compute process: a desktop?'}"
        return self.found(text, "end them before the engine loads; its KV cache takes what is free")


CHECKS: tuple[Check, ...] = (AllReduce(), ForeignMemory())
