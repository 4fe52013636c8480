"""Checks of a recipe's arithmetic and of the build command it leads to."""

from __future__ import annotations

from pathlib import Path

from trtqwen.diagnostics import TrtQwenError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.flags import build_command, check_against_help, check_command
from trtqwen.plan.plan import Plan, plan_recipe

_GIB = 2**30
_CAPACITY = ("memory", "kv-cache")  # the findings of `trtqwen plan` that speak of it


class MemoryPlan(Check):
    id = "D19"
    level = "error"
    title = "GPU memory"

    def run(self, subject: Subject) -> Result:
        plan = _plan(subject)
        found = [finding for finding in plan.findings if finding.code in _CAPACITY and finding.level == "error"]
        rank = plan.tightest
        evidence = f"KV cache {rank.kv_pool / _GIB:.1f} GiB, {plan.kv_tokens:,} tokens"
        if rank.card is not None:
            evidence = f"{rank.taken / _GIB:.1f} of {rank.card / _GIB:.1f} GiB before the KV cache, {evidence}"
        return self.judge(found, evidence)


class Concurrent(Check):
    id = "D20"
    level = "warning"
    title = "concurrency at full length"

    def run(self, subject: Subject) -> Result:
        full = _plan(subject).concurrency[-1]
        if full.sequences < 2:
            text = f"{full.sequences} request of {full.tokens:,} tokens runs at a time: serving will be sequential"
            remedy = "lower engine.max_seq_len, take more cards or INT8 weights, and have clients send max_tokens"
            return self.found(text, remedy)
        return Result("ok", f"{full.sequences} requests of {full.tokens:,} tokens")


def _plan(subject: Subject) -> Plan:
    recipe = subject.named_recipe
    if subject.model is None and recipe.model is None:
        raise Skip("give --model: the recipe names none")
    try:
        return plan_recipe(recipe, subject.model)
    except TrtQwenError:
        raise Skip("there is no plan, see D10 and D11") from None


class BuildFlags(Check):
    id = "D21"
    level = "error"
    title = "trtllm-build flags"

    def run(self, subject: Subject) -> Result:
        recipe = subject.named_recipe
        if recipe.engine.backend == "torch":
            raise Skip("the torch backend has no flags")
        command = build_command(recipe, Path("checkpoint"), Path("engine"))
        release = recipe.checkpoint.release
        check_command(command, release)
        if subject.host.trtllm_build is None:
            return Result("ok", f"{len(command) - 1} flags, by the table of {release}")
        text = subject.system.output(str(subject.host.trtllm_build), "--help")
        if text is None:
            return self.found("trtllm-build --help fails here", "run it by hand and look", "warning")
        check_against_help(command, text)
        return Result("ok", f"{len(command) - 1} flags, by the installed --help")


CHECKS: tuple[Check, ...] = (MemoryPlan(), Concurrent(), BuildFlags())
