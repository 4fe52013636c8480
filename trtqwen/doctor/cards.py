"""Checks of the GPUs' setup: PCI express, power, persistence."""

from __future__ import annotations

from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject

_LEAST_LANES = 8
_LEAST_POWER = 0.95  # of the default limit


class PciLink(Check):
    """Without peer access every all-reduce goes over these lanes, twice. Idle cards lower their speed."""

    id = "D37"
    level = "warning"
    title = "PCI express link of each card"

    def run(self, subject: Subject) -> Result:
        problems, seen = [], []
        fields = ("index", "pcie.link.width.current", "pcie.link.width.max", "pcie.link.gen.max")
        for index, width, widest, generation in _query(subject, *fields):
            seen.append(f"GPU {index} x{width} of x{widest}, PCIe {generation}")
            if subject.engine_ranks > 1 and width.isdecimal() and widest.isdecimal():
                if int(width) < _LEAST_LANES:
                    text = f"GPU {index} has {width} of {widest} lanes: all-reduce waits for the slowest card"
                    problems.append(Diagnostic(text, "use a slot with 8 lanes or more, or another riser"))
                elif generation.isdecimal() and int(generation) < 4:
                    text = f"GPU {index} runs at PCIe {generation} at most: half the speed of PCIe 4 or less"
                    problems.append(Diagnostic(text, "set the slot to PCIe 4 in the BIOS, or use another riser"))
        return self.judge(problems, ", ".join(seen))


class PowerLimit(Check):
    """No card is limited to less than 95 % of its default power."""

    id = "D38"
    level = "warning"
    title = "power limit of each card"

    def run(self, subject: Subject) -> Result:
        problems, seen = [], []
        for index, limit, default in _query(subject, "index", "power.limit", "power.default_limit"):
            seen.append(f"GPU {index} {limit} of {default} W")
            try:
                share = float(limit) / float(default)
            except (ValueError, ZeroDivisionError):
                continue
            if share < _LEAST_POWER:
                text = f"GPU {index} is limited to {limit} W, {share:.0%} of its default: prompts are read slower"
                problems.append(Diagnostic(text, f"nvidia-smi -i {index} -pl {default}, if that is not meant"))
        return self.judge(problems, ", ".join(seen))


class Persistence(Check):
    """In persistence mode the driver stays loaded when nothing runs, and starts are shorter."""

    id = "D39"
    level = "warning"
    title = "persistence mode"

    def run(self, subject: Subject) -> Result:
        rows = _query(subject, "index", "persistence_mode")
        off = [index for index, mode in rows if mode == "Disabled"]
        if not off:
            return Result("ok", f"on for {len(rows)} {'GPU' if len(rows) == 1 else 'GPUs'}")
        text = f"off for GPU {', '.join(off)}: the driver unloads when nothing runs, and each start takes longer"
        return self.found(text, "nvidia-smi -pm 1, or start nvidia-persistenced")


def _query(subject: Subject, *fields: str) -> list[list[str]]:
    """Return the rows of nvidia-smi, one per GPU."""
    if not subject.host.gpus:
        raise Skip("no GPU here")
    answer = subject.system.output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[field.strip() for field in line.split(",")] for line in (answer or "").splitlines()]
    rows = [row for row in rows if len(row) == len(fields)]
    if not rows:
        raise Skip("nvidia-smi does not tell")
    return rows


CHECKS: tuple[Check, ...] = (PciLink(), PowerLimit(), Persistence())
